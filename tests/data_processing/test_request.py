"""A request is kept in manifests as it always was."""

from src.data_processing.request import Request


def test_what_is_stored_is_read_again() -> None:
    stored = {
        "source": ["pydocs", "files"],
        "paths": ["/data/*.txt"],
        "text_field": "text",
        "tokens_per_shard": 100_000_000,
        "seed": 42,
        "max_documents": None,
        "max_tokens": 5_000,
        "drop_duplicates": True,
    }
    request = Request.from_stored(stored)
    assert (request.sources, request.max_tokens, request.is_limited) == (["pydocs", "files"], 5_000, True)
    assert list(request.stored().items()) == list(stored.items()), "in this order too, since manifests are hashed"
    assert not Request.from_stored(stored | {"max_tokens": None}).is_limited
