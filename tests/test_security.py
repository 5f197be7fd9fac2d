"""What others wrote (checkpoints, datasets, documents, a model's words) is data: it runs nothing, leads nowhere else,
and neither a page nor a terminal obeys it."""

import ast
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.data_processing.document_shuffle import Document, Journal
from src.data_processing.hub_dataset import open_hub
from src.data_processing.shards import check_shard, read_manifest
from src.data_processing.text_sources import Request
from src.model_assessment import sampling
from src.model_assessment.report import write_comparison, write_report
from src.model_utils import checkpoint_utils
from src.utils.errors import StorageError, UserError, exit_with
from src.utils.files import fingerprint
from src.utils.logger import RunLogger
from src.utils.root import ROOT
from tests.model_assessment.reported_runs import append, make_run

SOURCES = sorted([*ROOT.glob("src/**/*.py"), *ROOT.glob("benchmarks/**/*.py"), ROOT / "pretrain.py"])

# Nothing that reads a file may run what is in it. Objects that a run's own processes gather from each other, and those
# in pipes to worker processes of ours, are pickled by their libraries and are another matter: they never were a file.
FORBIDDEN_MODULES = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "jsonpickle"}
FORBIDDEN_BUILTINS = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    *("torch.load", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter", "torch.serialization.load"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "os.system", "os.popen", "subprocess.getoutput"),
    *("pd.read_pickle", "pandas.read_pickle", "np.lib.format.read_array", "numpy.lib.format.read_array"),
}

READING_TENSORS = "torch.load with weights_only=True"
# Others' files in a format that is none of ours; how far that can be trusted, its own tests say.
KNOWN_OFFENCES = {"src/model_utils/reference_import.py": [READING_TENSORS]}


def offences(code: str) -> Iterator[str]:
    """What in `code` could run data, or a shell."""
    for node in ast.walk(ast.parse(code)):
        modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            yield from names & (FORBIDDEN_CALLS | {"numpy.load"})  # each is called by its full name, to be seen below
        yield from {module.split(".")[0] for module in modules} & FORBIDDEN_MODULES
        if isinstance(node, ast.Call):
            name, options = ast.unparse(node.func), {option.arg: ast.unparse(option.value) for option in node.keywords}
            if name == "torch.load" and options.get("weights_only") == "True":
                yield READING_TENSORS
            elif name in FORBIDDEN_BUILTINS | FORBIDDEN_CALLS:
                yield name
            if name in ("np.load", "numpy.load") and options.get("allow_pickle") != "False":
                yield "np.load without allow_pickle=False"
            if options.get("shell", "False") != "False" or options.get("trust_remote_code", "False") != "False":
                yield ast.unparse(node)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_no_file_runs_data(path: Path):
    known = KNOWN_OFFENCES.get(path.relative_to(ROOT).as_posix(), [])
    assert list(offences(path.read_text(encoding="utf-8"))) == known


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from dill import loads",
        "import torch\ntorch.load('x')",
        "torch.load('x', weights_only=False)",
        "torch.load('x', weights_only=True)",
        "from torch import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "eval('1')",
        "yaml.load(text)",
        "subprocess.run('ls', shell=True)",
        "load_dataset('x', trust_remote_code=True)",
    ],
)
def test_offences_are_seen(code: str):
    assert list(offences(code))


def test_no_offence_is_seen_where_there_is_none():
    assert not list(offences("model.eval()\ntorch.compile(model)\nnp.load(path, allow_pickle=False)\njson.loads(text)"))


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    parts = {name: {"w": torch.ones(3)} for name in ("model", "optimizer", "rank_00000")}
    checkpoint_utils.save_checkpoint(tmp_path / "checkpoints", 1, parts, {})
    return tmp_path / "checkpoints" / "step_0000001"


@pytest.mark.parametrize("name", ["{outside}", "../outside", "..", ".", "", "sub/../../outside", "outside\0"])
def test_a_checkpoints_manifest_cannot_lead_elsewhere(checkpoint: Path, name: str):
    outside = checkpoint.with_name("outside")
    shutil.copy(checkpoint / "model.safetensors", outside)
    manifest = json.loads((checkpoint / "manifest.json").read_text())
    manifest["files"][name.format(outside=outside)] = fingerprint(outside)
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="Cannot use the checkpoint"):
        checkpoint_utils.open_checkpoint(checkpoint)


@pytest.mark.parametrize("name", ["model.safetensors", "state.json"])
def test_a_checkpoints_file_cannot_be_a_link_to_elsewhere(checkpoint: Path, name: str):
    outside = checkpoint.with_name("outside")
    (checkpoint / name).rename(outside)
    (checkpoint / name).symlink_to(outside)
    with pytest.raises(UserError, match=re.escape(name)):
        checkpoint_utils.open_checkpoint(checkpoint)


def test_a_linked_run_or_dataset_is_fine(checkpoint: Path, dataset: Callable[..., Path], tmp_path: Path):
    """Only what lies inside them must not lead out."""
    (tmp_path / "link").symlink_to(checkpoint.parent)
    assert checkpoint_utils.open_checkpoint(tmp_path / "link" / checkpoint.name).step == 1
    (tmp_path / "data").symlink_to(dataset(train_tokens=[70], val_tokens=50))
    manifest = read_manifest(tmp_path / "data")
    check_shard(tmp_path / "data", manifest.train[0], manifest.n_vocab, full=True)


@pytest.mark.parametrize("prefix", ["../", "{outside}/", "../datasets/../", "sub/", "\x1b[2J", "a\0"])
def test_a_datasets_manifest_cannot_lead_elsewhere(dataset: Callable[..., Path], prefix: str):
    """The files exist and match it."""
    folder = dataset(train_tokens=[70], val_tokens=50)
    manifest = json.loads((folder / "manifest.json").read_text())
    shard = manifest["shards"][1]
    for outside in (folder.parent, folder / "sub"):
        outside.mkdir(exist_ok=True)
        shutil.copy(folder / shard["file"], outside / shard["file"])
    shard["file"] = prefix.format(outside=folder.parent) + shard["file"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="is not the name of a shard"):
        read_manifest(folder)


def test_a_preparation_cannot_truncate_elsewhere(tmp_path: Path):
    request, tokens, outside = Request([], []), tmp_path / "tokens", tmp_path / "outside"
    journal = Journal(request.stored(), [])
    journal.counts |= {"documents": 1, "tokens": 1}
    journal.append(tmp_path, [Document(b"k" * 16, b"\x01\x00", 1)])
    assert Journal.read(tmp_path, request) == journal
    tokens.rename(outside)
    tokens.symlink_to(outside)
    assert Journal.read(tmp_path, request) is None
    with pytest.raises(StorageError, match="it is a link"):
        journal.append(tmp_path, [])
    assert outside.read_bytes() == b"\x01\x00"


def test_a_shard_cannot_be_a_link_to_elsewhere(dataset: Callable[..., Path]):
    folder = dataset(train_tokens=[70], val_tokens=50)
    manifest = read_manifest(folder)
    path = folder / manifest.train[0].file
    path.rename(folder.parent / "outside")
    path.symlink_to(folder.parent / "outside")
    expected = re.escape(f"{path} leads to {folder.parent / 'outside'}; expected a file in the folder itself")
    with pytest.raises(UserError, match=expected):
        check_shard(folder, manifest.train[0], manifest.n_vocab)


@pytest.mark.parametrize(
    ("revision", "path"), [("../../../outside", "a.parquet"), ("0" * 40, ".."), ("0" * 40, "a\0.parquet")]
)
def test_a_pinned_listing_cannot_lead_elsewhere(tmp_path: Path, revision: str, path: str):
    """A manifest names the hub's files that a repair fetches into a folder named by their revision, and deletes."""
    files = [{"path": path, "bytes": 1, "sha256": None}]
    pinned = {"name": "fineweb-edu", "repository": "org/data", "revision": revision, "hub_files": files}
    with pytest.raises(UserError, match="is impossible"):
        open_hub("fineweb-edu", Request([], [], "text", 1, 0), [pinned], tmp_path)


HOSTILE = (
    "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"' onload=\"alert(3)' <!-- ]]> </style></td>"
    "</title><iframe src=javascript:alert(4)></textarea><svg/onload=alert(5)>&lt;script&gt; javascript:alert(6) $title"
)


class Tags(HTMLParser):
    """How often each tag with its attributes' names stands on a page."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.found: Counter[Any] = Counter()
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found[tag, tuple(name for name, _ in attrs)] += 1

    def handle_data(self, data: str) -> None:
        self.text += data


def reported(folder: Path, text: str) -> Tags:
    """The page of a run that says `text` wherever it says anything, compared with itself."""
    step = {"step": 250, "time": 1_750_000_300.0}
    words = {"name": text, "dir": text, text: text, "sources": [{"name": text, text: text}], "list": [text]}
    make_run(folder, **{key: {**words, text: {text: text}} for key in ("dataset", "machine", "versions")}, command=text)
    config = json.loads((folder / "config.json").read_text())
    config["config"] |= {"run_name": text, text: {text: [text]}}
    config["machine"]["gpu"] = text
    (folder / "config.json").write_text(json.dumps(config))
    append(
        folder,
        *({"kind": "sample", **step, "prompt": prompt, "text": text} for prompt in (text, "The function returns")),
        *({"kind": "event", **step, "name": name, "detail": text} for name in (text, "resume", "skipped " + text)),
        {"kind": "event", **step, "name": text, "detail": {text: [text]}},
        {"kind": "checkpoint", **step, "path": text, "seconds": text, "bytes": 1e6},
        {"kind": "hellaswag", **step, "acc_norm": 0.3, "stderr": 0.05, "total": 100, "protocol": text},
    )
    status = {"state": text, "message": text, "exit_code": text, "step": 250, "total_steps": text}
    (folder / "status.json").write_text(json.dumps(status))
    alone, compared = Tags(write_report(folder)), Tags(write_comparison([folder, folder]))
    alone.found += compared.found
    alone.text += compared.text
    return alone


def test_a_report_shows_what_it_is_told_and_nothing_more(tmp_path: Path):
    harmless, hostile = reported(tmp_path / "harmless", "words"), reported(tmp_path / "hostile", HOSTILE)
    assert harmless.found == hostile.found
    assert not [tag for tag, _ in hostile.found if tag in ("script", "iframe", "svg")]
    assert hostile.text.count(HOSTILE) > 30  # to be read in all these places
    failed = json.loads((tmp_path / "hostile" / "status.json").read_text()) | {"state": "failed"}
    (tmp_path / "hostile" / "status.json").write_text(json.dumps(failed))
    assert f"with exit code {HOSTILE}: {HOSTILE}" in Tags(write_report(tmp_path / "hostile")).text


# To change the title, clear the screen (also as one character), ring, return, and reverse the line.
CONTROL = "a\x1b]0;title\x07b\x1b[2Jc\x9b2Jd\re\u202ef\x7f"
SHOWN = "a\\x1b]0;title\\x07b\\x1b[2Jc\\x9b2Jd\\re\\u202ef\\x7f"


def test_a_log_line_is_only_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    log = RunLogger(tmp_path, is_main=True)
    log.info(f"sample: {CONTROL}\n\tnext")
    log.event(CONTROL, 1, CONTROL)
    expected = f"sample: {SHOWN}\n\tnext\n{SHOWN}: {SHOWN}\n"
    assert capsys.readouterr().err == expected
    assert re.sub(r"(?m)^\d{4}-\S+Z ", "", (tmp_path / "log.txt").read_text()) == expected


@pytest.mark.parametrize("more", [[], ["--stream"]])
def test_samples_keep_their_lines_and_lose_their_control(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str]
):
    text = f"line\n\tindented {CONTROL}"
    made = sampling.Sample("prompt", text, [1], [-1.0])
    loaded = SimpleNamespace(
        path=Path("step_0000001"), generate=lambda *_, **__: [made], stream=lambda *_, **__: iter(text)
    )
    monkeypatch.setattr(sampling, "TextModel", lambda *_: loaded)
    monkeypatch.setattr("sys.argv", ["sampling", "--checkpoint", "x", "--prompt", "prompt", *more])
    sampling.main()
    shown, _, rest = capsys.readouterr().out.partition("-" * 40)
    assert shown == f"promptline\n\tindented {SHOWN}\n"
    if not more:
        assert json.loads(rest)["samples"][0]["text"] == text
        assert not set(rest.strip()) & set("\x1b\x07\x9b\r\u202e\x7f")


def test_an_error_cannot_control_a_terminal(capsys: pytest.CaptureFixture[str]):
    def main() -> None:
        raise UserError(f"found {CONTROL}\n  - in a list")

    with pytest.raises(SystemExit) as caught:
        exit_with(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err.endswith(f": error: found {SHOWN}\n  - in a list\n")
