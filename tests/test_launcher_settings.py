"""The launcher's variables: defaults by preset and source, and each mistake in one line before anything is prepared."""

import sys
from pathlib import Path

import pytest
import torch

from src import available_cores
from src.data_processing.data_downloader import prepare
from src.launcher_settings import requested, settings
from src.model_configs.my_llm_config import PRESETS, Preset, debug
from src.utils import root
from src.utils.errors import UserError
from tests.conftest import Commands


@pytest.fixture(autouse=True)
def _folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(root, "DATASETS", tmp_path / "datasets")
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(sys, "argv", ["run_pre_training_e2e.sh"])
    monkeypatch.chdir(tmp_path)


def test_the_preset_decides_what_is_not_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    full = settings({}, [])
    assert [full[name] for name in ("PRESET", "RUN_NAME", "NPROC")] == ["lf_llm_269m", "lf_llm_269m", 8]
    folder = str(tmp_path / "datasets" / "fineweb-edu-sample-10BT")
    assert full["preparation"] == ["--source", "fineweb-edu", "--out", folder]
    small = settings({"DEBUG_MODE": "True"}, ["--train.total-steps", "5"])
    assert [small[name] for name in ("PRESET", "NPROC", "DATA_SOURCE")] == ["debug", 1, "pydocs"]
    assert small["OMP_NUM_THREADS"] == available_cores()
    assert small["@"] == ["debug", "--run-name", "debug", "--data.dir", "pydocs", "--train.total-steps", "5"]


def test_a_preset_needs_no_more_than_its_row(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(PRESETS, "mine", Preset(debug, source="pydocs", processes="one"))
    assert settings({"PRESET": "mine"}, [])["RUN_NAME"] == "mine"


def test_sources(tmp_path: Path):
    found = settings({"PRESET": "debug", "DATA_PATH": "a b\n~/c", "DATA_MAX_TOKENS": "1_000"}, [])
    folder = str(tmp_path / "datasets" / "a_b+c-max-1000-tokens")
    paths = [str(tmp_path / "a b"), str(Path.home() / "c")]
    assert found["preparation"] == ["--source", "files", "--out", folder, "--path", *paths, "--max-tokens", "1000"]
    assert found["RUN_NAME"] == "debug-a_b+c-max-1000-tokens"
    found = settings({"PRESET": "debug", "DATA_DATASET": "owner/name", "DATA_SPLIT": "test", "DATA_DIR": "./x"}, [])
    expected = ["--source", "hub", "--out", str(tmp_path / "x"), "--dataset", "owner/name", "--split", "test"]
    assert found["preparation"] == expected


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("book.txt", "book"),
        ("my texts/part.jsonl.gz", "part"),
        ("my texts/**/*.md", "my_texts"),
        ("a.txt:b c.md:d/", "a+b_c+d"),
        ("a:b:c:d:e", "a+4-more"),
    ],
)
def test_names_follow_from_the_text(path: str, name: str):
    found = settings({"PRESET": "laptop", "DATA_PATH": path}, [])
    assert (Path(str(found["DATASET"])).name, found["RUN_NAME"]) == (name, f"laptop-{name}")


def test_long_names_fit_a_file_system(tmp_path: Path):
    found = settings({"PRESET": "laptop", "DATA_PATH": "\u6587" * 80 + ".txt"}, [])
    assert len(Path(str(found["DATASET"])).name.encode()) == 120


def test_the_command_that_resumes_neither_starts_over_nor_goes_back(tmp_path: Path):
    found = settings({}, ["debug", "--resume", "never", "--train.seed", "1", "--resume=4"])
    assert str(found["RESUME"]).endswith(" debug --train.seed 1")


def test_plain_arguments_are_a_preset_and_text(tmp_path: Path):
    found = settings({"PRESET": "debug", "DATA_PATH": "other.txt"}, ["laptop", "a.txt", "b", "--train.seed", "1"])
    assert (found["PRESET"], found["RUN_NAME"], found["DATA_PATH"]) == (
        "laptop",
        "laptop-a+b",
        f"{tmp_path}/a.txt\n{tmp_path}/b",
    )
    assert found["@"][-2:] == ["--train.seed", "1"]  # type: ignore[index]
    with pytest.raises(UserError, match=r"Cannot find the preset 'book.txt'. The first argument is one of debug, "):
        settings({}, ["book.txt"])


def test_a_second_corpus_gets_a_new_dataset_and_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """And one more file is another corpus; the earlier run stays reachable."""
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(3):
        (texts / f"{number}.txt").write_text(f"text {number} " * 50)
    variables = {"PRESET": "debug", "DATA_PATH": str(texts)}

    def names() -> tuple[str, str]:
        found = settings(variables, [])
        return Path(str(found["DATASET"])).name, str(found["RUN_NAME"])

    def prepare_it(name: str) -> None:
        prepare(requested(variables | {"DATA_SOURCE": "files"}), tmp_path / "datasets" / name, workers=1)

    assert names() == ("texts", "debug-texts")
    prepare_it("texts")
    assert names() == ("texts", "debug-texts")
    (texts / "3.txt").write_text("one more")
    capsys.readouterr()
    assert names() == ("texts-2", "debug-texts-2")
    said = capsys.readouterr().err
    assert f"holds different text: {texts}/3.txt is new. " in said
    assert "To train on that, or resume, add --data.dir texts --run-name debug-texts" in said
    prepare_it("texts-2")
    assert names() == ("texts-2", "debug-texts-2")
    (texts / "3.txt").unlink()
    assert names() == ("texts", "debug-texts")


def test_overrides_win():
    found = settings(
        {"PRESET": "debug", "RUN_NAME": "one", "DATA_DIR": "x"}, ["--run-name=two", "--data.dir", "y", "--dry-run"]
    )
    assert [found[name] for name in ("RUN_NAME", "DATA", "DRY_RUN", "preparation")] == ["two", "ready", "yes", []]
    assert found["@"] == ["debug", "--run-name", "one", "--run-name=two", "--data.dir", "y"]


def test_another_machine_waits_for_the_data():
    variables = {"PRESET": "laptop", "NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "first", "DATA_PATH": "book.txt"}
    found = settings(variables, ["--train.timeout-s", "30"])
    assert (found["DATA"], found["preparation"]) == ("wait", [])
    assert int(str(found["MEETING_SECONDS"])) > 30


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"DEBUG_MODE": "1"}, "DEBUG_MODE is '1'; it must be one of True, False."),
        ({"PRESET": "foo"}, "PRESET is 'foo'; it must be one of debug, laptop, lf_llm_269m, lf_llm_269m_fast."),
        ({"NPROC": "0"}, "NPROC is '0'; it must be a number of processes, from 1 to 1,024."),
        ({"NPROC": "9" * 400}, "it must be a number of processes, from 1 to 1,024."),
        ({"NPROC": "-1"}, "NPROC is '-1'; it must be"),
        ({"NNODES": "x"}, "NNODES is 'x'; it must be a number of machines, from 1 to 1,024."),
        ({"NODE_RANK": "1"}, "NODE_RANK is '1'; it must be this machine's number, from 0 to 0."),
        ({"NNODES": "2"}, "MASTER_ADDR is not set. With NNODES=2, set it to the machine of NODE_RANK=0 on all."),
        ({"MASTER_PORT": "http"}, "MASTER_PORT is 'http'; it must be a port, from 1 to 65,535."),
        ({"MAX_RESTARTS": "1.5"}, "MAX_RESTARTS is '1.5'; it must be a number of restarts, from 0 to "),
        (
            {"DATA_MAX_TOKENS": "10M"},
            "DATA_MAX_TOKENS is '10M'; it must be a number of tokens, such as 10_000_000 or 1e7, from 1 to ",
        ),
        ({"DATA_SOURCE": "pydoc"}, "DATA_SOURCE is 'pydoc'; it must be one of "),
        ({"DATA_SOURCE": "hub"}, "DATA_DATASET is not set. DATA_SOURCE=hub needs"),
        (
            {"PRESET": "laptop"},
            "The text for preset laptop is missing. Name files or folders before all settings: ./run_pre_",
        ),
    ],
)
def test_a_mistake_is_one_line(variables: dict[str, str], expected: str):
    with pytest.raises(UserError) as raised:
        settings({"PRESET": "debug", **variables}, [])
    assert expected in str(raised.value)
    assert len(str(raised.value)) < 600


def test_texts_and_a_dataset_exclude_each_other():
    with pytest.raises(UserError, match=r"Cannot use both 'book\.txt' and --data\.dir"):
        settings({}, ["laptop", "book.txt", "--data.dir", "notes"])


def test_what_runs_before_packages_are_installed_needs_none(commands: Commands):
    """-S leaves out what is installed."""
    result = commands.run([sys.executable, "-S", "-m", "src.launcher_settings", "--early", "laptop"])
    assert result.returncode == 2
    assert "error: The text for preset laptop is missing." in result.stderr
