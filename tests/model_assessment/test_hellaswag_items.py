"""Items from files and from the hub, and refusals of every line that is not one."""

import gzip
import json
import time
from pathlib import Path
from typing import Any

import datasets
import pytest
from huggingface_hub import constants as hub

from src.model_assessment.hellaswag_items import Item, fetch_items, load_items
from src.utils.errors import UserError

RECORD: dict[str, Any] = {
    "ind": 7,
    "ctx": "A man sits. then HE",
    "endings": ["stands up.", "is a roof.", "sings it.", "ate."],
    "label": 2,
    "activity_label": "Sitting",
    "ctx_a": "A man sits.",
    "ctx_b": "then HE",
}
PARTS = ("Sitting", "A man sits.", "then HE")


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_files_are_read_plain_or_compressed(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"items{suffix}"
    text = "".join(json.dumps({**RECORD, "ind": ind, "other": None}) + "\n" for ind in range(3)) + "\n"
    path.write_bytes(gzip.compress(text.encode()) if suffix.endswith("gz") else text.encode())
    items = load_items(path)
    assert items[1] == Item(1, RECORD["ctx"], ("stands up.", "is a roof.", "sings it.", "ate."), 2, *PARTS)
    assert [item.ind for item in items] == [0, 1, 2]
    assert load_items(path, limit=2) == items[:2]
    assert load_items(path, limit=9) == items


def test_the_parts_of_a_context_may_be_missing(tmp_path: Path) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps({k: v for k, v in RECORD.items() if k != "ctx_b"} | {"activity_label": None}))
    (item,) = load_items(path)
    assert (item.activity_label, item.ctx_a, item.ctx_b) == (None, "A man sits.", None)


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("not json", "'not json', not a JSON object"),
        ("[" * 100_000, "not a JSON object"),
        ("[1, 2]", "'[1, 2]', not a JSON object"),
        (json.dumps({**RECORD, "label": 4}), "wrong: label."),
        (json.dumps({**RECORD, "label": True}), "wrong: label."),
        (json.dumps({**RECORD, "ind": "x", "ctx": " "}), "wrong: ind, ctx."),
        (json.dumps({**RECORD, "endings": ["a", "b", "c"]}), "wrong: endings."),
        (json.dumps({**RECORD, "endings": ["a", "b", "c", ""]}), "wrong: endings."),
        (json.dumps({k: v for k, v in RECORD.items() if k != "endings"}), "wrong: endings."),
        (json.dumps({**RECORD, "ctx_b": ["he"]}), "wrong: activity_label, ctx_a, ctx_b."),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, fault: str) -> None:
    path = tmp_path / "items.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + line + "\n")
    with pytest.raises(UserError) as error:
        load_items(path)
    assert f"{path}, line 2: " in str(error.value)
    assert fault in str(error.value)
    assert "Needed: ind" in str(error.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.jsonl", b"", "is empty"),
        ("blank.jsonl", b"\n \n", "is empty"),
        ("absent.jsonl", None, "No such file"),
        ("not_gzip.jsonl.gz", json.dumps(RECORD).encode(), "gzip"),
        ("cut_short.jsonl.gz", gzip.compress(json.dumps(RECORD).encode() * 50, mtime=0)[:-20], "end-of-stream"),
        ("damaged.jsonl.gz", gzip.compress(b"x" * 9, mtime=0)[:10] + b"\xff" * 30, "decompressing"),
        ("binary.jsonl", b"\xff\xfe\x00", "codec"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError) as error:
        load_items(path)
    assert str(path) in str(error.value)
    assert message in str(error.value)


def test_the_hubs_records_become_items(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", True)  # no look at the network
    records = [{**RECORD, "ind": ind, "label": "3"} for ind in range(3)]
    monkeypatch.setattr(
        datasets, "load_dataset", lambda name, split: {("Rowan/hellaswag", "validation"): records}[name, split]
    )
    assert fetch_items() == [Item(ind, RECORD["ctx"], tuple(RECORD["endings"]), 3, *PARTS) for ind in range(3)]
    assert len(fetch_items(2)) == 2


def test_an_unreachable_hub_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "ENDPOINT", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(UserError, match=r"http://127.0.0.1:9 does not answer.*local copy.*held-out"):
        fetch_items()
    assert time.monotonic() - started < 10


def test_the_real_validation_set(shared: Path) -> None:
    items = load_items(shared / "eval" / "hellaswag_val.jsonl.gz")
    assert len(items) == 10_042
    assert (items[0].ind, items[0].ctx, items[0].label) == (24, "A man is sitting on a roof. he", 3)
    assert items[0].endings[3] == "starts pulling up roofing on a roof."
    assert all(item.ctx == f"{item.ctx_a} {item.ctx_b}".strip() for item in items)
