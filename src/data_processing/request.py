"""What a dataset is asked to be: the arguments that decide its content, as the manifest keeps them."""

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Request:
    """The arguments that decide a dataset's content."""

    sources: list[str]
    """Of pydocs, files and fineweb-edu, in the order in which they are read."""
    paths: list[str]
    """For files: files, folders and patterns."""
    text_field: str
    """The field or column that holds the text, in files of lines or rows."""
    tokens_per_shard: int
    """A shard holds at most this many token ids, or one longer document."""
    seed: int
    """Of the order of the documents, and of the choice of a part of fineweb-edu."""
    max_documents: int | None = None
    """No more documents than this; None: all."""
    max_tokens: int | None = None
    """No more documents than make up this many token ids; None: all."""
    drop_duplicates: bool = False
    """Whether one is left of documents that are equal to the byte."""

    dataset: str | None = None
    """For hub: OWNER/NAME."""
    config: str | None = None
    """For hub: the dataset's configuration."""
    split: str | None = None
    """For hub: the dataset's split."""

    @property
    def is_limited(self) -> bool:
        """Whether perhaps not all documents are taken."""
        return self.max_documents is not None or self.max_tokens is not None

    def stored(self) -> dict[str, Any]:
        """As the manifest has it, where the sources are called `source`."""
        fields = {name: value for name, value in asdict(self).items() if value is not None or name.startswith("max")}
        return {"source": fields.pop("sources"), **fields}

    @classmethod
    def from_stored(cls, content: dict[str, Any]) -> "Request":
        fields = dict(content)
        return cls(sources=fields.pop("source"), **fields)
