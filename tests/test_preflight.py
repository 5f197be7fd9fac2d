"""The preflight: what it says of a start that can work, and of each that cannot."""

import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch

from src import preflight_checks as checks
from src.data_processing import shards
from src.model_configs.my_llm_config import debug, laptop, lf_llm_269m
from src.params import Config, ConfigError, DataConfig, EvalConfig
from src.preflight_checks import Found, Preparation, Start
from src.utils import root
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.files import claimed
from tests.conftest import Commands
from tests.drills.small_run import contents, shard_paths
from tests.test_processes import SETTINGS

ITEM = {"ind": 1, "ctx": "A cat sits", "endings": ["down.", "up.", "in.", "out."], "label": 0}


@pytest.fixture
def data(dataset: Callable[..., Path]) -> Path:
    return dataset(train_tokens=[700, 900], n_vocab=300)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(root, "DATASETS", tmp_path / "datasets")


def start_of(
    config: Config, data: Path | str = "here", preparation: Preparation | None = None, processes: int = 1
) -> Start:
    return Start(replace(config, data=DataConfig(dir=str(data))), processes, processes, preparation)


def small(config: Config) -> Config:
    """For the random datasets: windows of 17 tokens, batches of 8."""
    return replace(
        config,
        model=replace(config.model, n_ctx=16, n_vocab=300),
        train=replace(config.train, batch_tokens=128, micro_batch_size=2),
    )


def asking(data: str, items: int = 10) -> Start:
    """A start that asks for multiple-choice items."""
    return start_of(replace(debug(), eval=EvalConfig(hellaswag_data=data, hellaswag_items=items)))


def test_a_start_that_can_work(commands: Commands, data: Path):
    arguments = ("debug", "--data.dir", str(data), *SETTINGS)
    assert commands.module("src.preflight", *arguments).returncode == 0
    before = contents(commands.temp_data)  # with the dataset's stamp
    result = commands.module("src.preflight", *arguments)
    assert result.returncode == 0, result.stderr
    assert contents(commands.temp_data) == before
    lines = result.stderr.splitlines()
    assert all(line.startswith("ok    ") for line in lines)
    assert len({len(line) - len(line[6:].split(":", 1)[1].lstrip()) for line in lines}) == 1, "values in one column"
    assert f"ok    dataset:      {data}, 3,600 tokens in 3 shards, verified" in lines
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["exit_code"], summary["failed"], summary["warnings"]) == (0, [], [])
    assert list(summary["checks"]) == [line[6:].split(":")[0] for line in lines]


def test_all_failures_at_once_and_what_to_do(commands: Commands, tmp_path: Path):
    arguments = ("laptop", "--data.dir", "nowhere", "--eval.hellaswag-data", "nothing.jsonl", "--resume", "7")
    result = commands.module("src.preflight", *arguments, "--train.micro-batch-size", "5")
    assert result.returncode == 2
    assert json.loads(result.stdout)["failed"] == ["processes", "HellaSwag", "dataset", "run folder"]
    assert "5 cannot share evenly; with 1 process(es), micro_batch_size can be 1, 2, 4, 8, 16 or 32" in result.stderr
    assert "Cannot read nothing.jsonl: No such file or directory. Give a local copy" in result.stderr
    assert (
        f"no dataset at {tmp_path}/datasets/nowhere: no such folder; prepare it with: python -m src." in result.stderr
    )
    assert f"--resume 7: {tmp_path}/runs/laptop/checkpoints has no such checkpoint" in result.stderr
    assert result.stderr.endswith("4 check(s) failed: processes, HellaSwag, dataset, run folder\n")
    assert list(tmp_path.iterdir()) == []


def test_settings_that_make_no_sense_end_it_as_they_end_training(commands: Commands):
    for arguments in (["--model.n-embd", "30"], ["--train.total-step", "3"]):
        found = [
            run("debug", *arguments) for run in (lambda *a: commands.module("src.preflight", *a), commands.pretrain)
        ]
        assert [result.returncode for result in found] == [2, 2]
        words = [result.stderr.replace("src.preflight", "pretrain.py") for result in found]
        assert words[0].replace("preflight.py", "pretrain.py").splitlines()[:3] == words[1].splitlines()[:3]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where not even root can write")
def test_storage_alone_has_its_own_exit_code(commands: Commands, data: Path):
    commands.environment["TEMP_DATA_DIR"] = "/proc/nowhere"
    result = commands.module("src.preflight", "debug", "--data.dir", str(data), *SETTINGS)
    assert result.returncode == 4
    assert "FAIL  run folder:   Cannot write in /proc: " in result.stderr
    assert commands.module("src.preflight", "debug", "--data.dir", "gone", *SETTINGS).returncode == 2


def test_a_run_that_another_process_holds(commands: Commands, data: Path, tmp_path: Path):
    with claimed(tmp_path / "runs" / "held"):
        result = commands.module("src.preflight", "debug", "--run-name", "held", "--data.dir", str(data), *SETTINGS)
    assert result.returncode == 5
    assert f'another process is training in {tmp_path}/runs/held: {{"pid": {os.getpid()}, ' in result.stderr
    with pytest.raises(BusyError), claimed(tmp_path / "runs" / "debug"):
        checks.run_folder(start_of(debug()))
    assert checks.run_folder(start_of(debug())).words == f"{tmp_path}/runs/debug, new"


def test_the_launchers_variables(commands: Commands, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "one.txt").write_text("One.")
    commands.environment |= {"WORLD_SIZE": "4", "NPROC": "2", "STARTED_IN": str(tmp_path), "PREPARES_DATA": "yes"}
    commands.environment |= {"DATA_SOURCE": "files", "DATA_PATH": "texts\n", "DATA_MAX_TOKENS": "1_000"}
    result = commands.module("src.preflight", "laptop")
    assert result.returncode == 0, result.stderr
    assert (
        "ok    processes:    4, 2 of them on this machine, micro-batch 8 x 256, 1 accumulation step(s)" in result.stderr
    )
    assert f"{tmp_path}/datasets/my_text, to be prepared from files, 1 of them" in result.stderr
    commands.environment["DATA_PATH"] = ""
    assert "FAIL  dataset:      DATA_PATH is not set" in commands.module("src.preflight", "laptop").stderr
    commands.environment["DATA_SOURCE"] = "node 0"  # this machine waits
    waiting = commands.module("src.preflight", "laptop")
    assert waiting.returncode == 0, waiting.stderr
    assert f"{tmp_path}/datasets/my_text, to be prepared by node 0" in waiting.stderr


def test_damaged_data(data: Path):
    start = start_of(small(debug()), data)
    assert not checks.dataset(start).is_doubtful
    first, last = shard_paths(data)[0], shard_paths(data)[-1]
    content = bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UserError) as caught:
        checks.dataset(start)
    assert f"{first}: " in str(caught.value)
    assert f"{last}: expected" in str(caught.value)
    assert "--repair" in str(caught.value)


def test_a_large_dataset_that_nobody_has_read(data: Path, monkeypatch: pytest.MonkeyPatch):
    """Its lengths are checked, and what will be read is said; a stamped one is taken as verified at any size."""
    start = start_of(small(debug()), data)
    monkeypatch.setattr(shards, "_SECONDS_BYTES", 1_000)
    assert checks.dataset(start).words.endswith("as long as they should be; 7.2 kB will be read before the first step")
    path = shard_paths(data)[2]
    whole = path.read_bytes()
    path.write_bytes(whole[:-2])
    with pytest.raises(UserError, match="the array is cut short"):
        checks.dataset(start)
    path.write_bytes(whole)
    monkeypatch.setattr(shards, "_SECONDS_BYTES", 1_000_000)
    checks.dataset(start)
    monkeypatch.setattr(shards, "_SECONDS_BYTES", 0)
    assert checks.dataset(start).words.endswith("verified")


def test_data_that_cannot_serve_the_run(data: Path):
    config = small(debug())
    with pytest.raises(UserError, match="At least 200 are needed"):
        checks.dataset(start_of(replace(config, train=replace(config.train, batch_tokens=3_200)), data))
    narrow = replace(config, model=replace(config.model, n_vocab=299))
    with pytest.raises(UserError, match=r"set --model\.n-vocab 300"):
        checks.dataset(start_of(narrow, data))
    with pytest.raises(UserError, match=r"set --model\.n-vocab 50257"):
        checks.dataset(start_of(narrow, "new", Preparation("pydocs")))


def test_a_dataset_that_is_missing_is_prepared_from_what_its_name_says(tmp_path: Path):
    for config, source in ((debug(), "pydocs"), (laptop(), "files --path FILES"), (lf_llm_269m(), "fineweb-edu")):
        folder = tmp_path / "datasets" / config.data.dir
        with pytest.raises(UserError, match=rf"data_downloader --source {source} --out {folder}$"):
            checks.dataset(Start(config, 1, 1))


def test_its_help_calls_it_by_its_name(commands: Commands):
    words = commands.module("src.preflight", "debug", "--help").stdout
    assert "python -m src.preflight debug" in words
    assert "pretrain.py debug" not in words


def test_files_to_prepare_from_that_are_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        checks.dataset(start_of(laptop(), "new", Preparation("files", (str(tmp_path / "none"),))))


def test_one_disk_for_data_and_checkpoints(monkeypatch: pytest.MonkeyPatch):
    """The recipe's 26.9 GB and the corpus's 31.1 GB fit alone, but not together."""
    start = start_of(lf_llm_269m(), "new", Preparation("fineweb-edu"))
    monkeypatch.setattr(checks, "free_bytes", lambda _: 57_000_000_000)
    with pytest.raises(
        StorageError, match=r"26\.9 GB for checkpoints \+ 31\.1 GB for data needed, only 57\.0 GB free at"
    ):
        checks.disk(start)
    monkeypatch.setattr(checks, "free_bytes", lambda _: 59_000_000_000)
    assert not checks.disk(start).is_doubtful
    monkeypatch.setattr(checks, "free_bytes", lambda _: 27_000_000_000)
    assert "for data" not in checks.disk(start_of(lf_llm_269m())).words
    a_part = start_of(lf_llm_269m(), "new", Preparation("fineweb-edu", max_tokens=1_000_000_000))
    assert checks.disk(a_part).is_doubtful  # 2.25 GB more, by an estimate


def test_what_an_earlier_start_has_prepared_is_not_needed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(checks, "free_bytes", lambda path: 10**15)
    start = start_of(lf_llm_269m(), "new", Preparation("fineweb-edu"))
    assert "31.1 GB for data" in checks.disk(start).words
    work = tmp_path / "datasets" / "new" / ".preparing"
    work.mkdir(parents=True)
    (work / "run_000000.tokens").touch()
    os.truncate(work / "run_000000.tokens", 10_000_000_000)
    assert "21.1 GB for data" in checks.disk(start).words


def test_multiple_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "items.jsonl").write_text(3 * (json.dumps(ITEM) + "\n"))
    assert checks.hellaswag(asking(str(tmp_path / "items.jsonl"))).words.startswith("3 items in ")
    assert checks.hellaswag(asking("auto", items=0)).words == "off"
    monkeypatch.setattr(checks.hub, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9 does not answer\. .* HF_HUB_OFFLINE=1 uses the cached copy"
    ):
        checks.hellaswag(asking("auto"))
    monkeypatch.setattr(checks.hub, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="not in the cache, and HF_HUB_OFFLINE is set; give a local copy"):
        checks.hellaswag(asking("auto"))
    cached = tmp_path / "cache" / "Rowan___hellaswag" / "default" / "0.0.0" / "a1b2" / "hellaswag-validation.arrow"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert checks.hellaswag(asking("auto")).words == f"fetched before, in {cached.parent}"


def test_a_clock_behind_the_files(data: Path):
    start = start_of(small(debug()), data)
    assert checks.clock(start).words.endswith(" UTC")
    saved = start.checkpoints / "step_0000005" / "manifest.json"
    saved.parent.mkdir(parents=True)
    saved.touch()
    os.utime(saved, (time.time() + 86_400 + 3_600,) * 2)
    found = checks.clock(start)
    assert found.is_doubtful
    assert "1 day, 1:00:0" in found.words or "1 day, 0:59:5" in found.words
    assert f"behind {saved}" in found.words


def test_versions(monkeypatch: pytest.MonkeyPatch):
    for version, is_doubtful in (("2.10.1", True), ("2.11.0+cu130", False), ("2.13.2", False), ("2.14.0", True)):
        monkeypatch.setattr(torch, "__version__", version)
        assert checks.pytorch(start_of(debug())).is_doubtful == is_doubtful
    monkeypatch.setattr(checks.platform, "python_version", lambda: "3.14.0rc1")
    assert checks.python(start_of(debug())).words == "3.14.0rc1; tested are 3.10 to 3.13"


def test_more_processes_than_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "Big GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda number: ([80, 30][number] * 10**9, 80 * 10**9))
    with pytest.raises(UserError, match=r"process 3 of this machine needs CUDA device 3, .* sees 2 of them"):
        checks.device(start_of(debug(), processes=4))
    found = checks.device(start_of(debug(), processes=2))
    assert found.is_doubtful
    assert found.words.startswith("2 of 2 GPU(s), Big GPU, 80.0 GB of memory each; GPU 1 has 30.0 GB free")
    assert not checks.device(start_of(debug(), processes=1)).is_doubtful


def test_a_backend_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    config = replace(debug(), train=replace(debug().train, device="cpu"))
    assert checks.backend(start_of(config)) is None
    monkeypatch.setattr(torch.distributed, "is_gloo_available", lambda: False)
    with pytest.raises(UserError, match="gloo is missing from PyTorch"):
        checks.backend(start_of(config, processes=2))


def test_processes_that_cannot_share_a_batch():
    with pytest.raises(ConfigError, match="3 process"):
        checks.processes(start_of(debug(), processes=3))


def test_memory_that_will_not_do(monkeypatch: pytest.MonkeyPatch):
    config = replace(debug(), train=replace(debug().train, device="cpu", precision="float32"))
    for free, is_doubtful in ((18 * 10**8, True), (3 * 10**9, False)):  # this preset took 2.4 GB
        monkeypatch.setattr(checks, "available_memory_bytes", lambda free=free: free)
        found = checks.memory(start_of(config))
        assert found is not None
        assert found.is_doubtful == is_doubtful


def test_precision_that_is_emulated(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("src.utils.hardware._cpu_multiplies_bf16_faster", lambda: False)
    train = replace(debug().train, device="cpu", precision="bf16")
    assert checks.precision(start_of(replace(debug(), train=train))).is_doubtful
    found = checks.precision(start_of(replace(debug(), train=replace(train, precision="auto"))))
    assert found.words == "float32 (the faster one here)"


def test_a_compiler_that_is_missing(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(
        torch, "__file__", "/programs/torch/__init__.py"
    )  # these tests may lie in a folder with a space
    monkeypatch.setenv("CXX", "no-such-compiler")
    train = replace(debug().train, device="cpu")

    def compiler(asked: Literal["auto", "on", "off"]) -> Found:
        return checks.compiler(start_of(replace(debug(), train=replace(train, compile=asked))))

    assert not compiler("off").is_doubtful
    assert compiler("auto").is_doubtful
    with pytest.raises(UserError, match="no no-such-compiler, which"):
        compiler("on")
    monkeypatch.setenv("CXX", sys.executable)
    assert compiler("on").words.startswith(f"{sys.executable}; as asked for; results are kept in ")


def test_pytorch_in_a_folder_with_a_space(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "__file__", "/my programs/torch/__init__.py")
    train = replace(debug().train, device="cpu")
    found = checks.compiler(start_of(replace(debug(), train=train)))
    assert found.is_doubtful
    assert "/my programs/torch" in found.words
    with pytest.raises(UserError, match="do not take a space"):
        checks.compiler(start_of(replace(debug(), train=replace(train, compile="on"))))


@pytest.mark.parametrize("name", ["file/cache", "a folder/cache"])
def test_a_folder_for_compiled_code_that_cannot_serve(name: str, commands: Commands, tmp_path: Path):
    """PyTorch makes it when it is imported for training, and ends there; its compiler takes no spaces."""
    (tmp_path / "file").touch()
    commands.environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / name)
    lines = "import os, src, torch._dynamo; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    result = commands.run([sys.executable, "-c", lines])
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == Path(tempfile.gettempdir())


def test_a_prepared_dataset_may_lie_where_nobody_can_write(data: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: Path) -> None:
        raise StorageError(f"cannot write in {folder}: Read-only file system")

    monkeypatch.setattr(checks, "check_writable", refuse)
    assert checks.data_folder(start_of(debug(), data)).is_doubtful
    with pytest.raises(StorageError):
        checks.data_folder(start_of(debug(), "new"))


def test_it_takes_seconds(commands: Commands):
    """It imports nothing slow but PyTorch: a time limit would fail on a busy machine."""
    slow = ("torch", "datasets", "matplotlib", "pyarrow", "pandas", "transformers", "torch._dynamo")
    lines = f"import sys, src.preflight; print([name for name in {slow} if name in sys.modules])"
    assert commands.run([sys.executable, "-c", lines]).stdout == "['torch']\n"
