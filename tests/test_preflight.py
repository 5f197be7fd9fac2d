"""Preflight: the result for a start that can work, and the message for each that cannot."""

import json
import os
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch

from src import preflight
from src.data_processing.text_sources import SOURCES, Request
from src.model_configs.my_llm_config import debug, laptop, lf_llm_269m
from src.params import Config, ConfigError, DataConfig, EvalConfig
from src.preflight import Doubt, Start
from src.utils import files, root
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.files import claimed
from tests.conftest import Commands
from tests.drills.small_run import SETTINGS, contents, module, shard_paths

ITEM = {"ind": 1, "ctx": "A cat sits", "endings": ["down.", "up.", "in.", "out."], "label": 0}


@pytest.fixture
def data(dataset: Callable[..., Path]) -> Path:
    return dataset(train_tokens=[700, 900], n_vocab=300)


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(root, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(root, "DATASETS", tmp_path / "datasets")


def start_of(config: Config, data: Path | str = "here", request: Request | None = None, processes: int = 1) -> Start:
    config = replace(config, data=DataConfig(dir=str(data)))
    return Start(config, processes, processes, request)


def request(source: str, *paths: str, max_tokens: int | None = None) -> Request:
    return Request([source], list(paths), "text", 100_000_000, 42, max_tokens=max_tokens)


def on(device: Literal["cpu", "cuda"], config: Config, **changes: Any) -> Config:
    return replace(config, train=replace(config.train, device=device, **changes))


def small(config: Config) -> Config:
    """For the random datasets: windows of 17 tokens, batches of 8."""
    return replace(
        config,
        model=replace(config.model, n_ctx=16, n_vocab=300),
        train=replace(config.train, batch_tokens=128, micro_batch_size=2),
    )


def asking(data: str, items: int = 10) -> Start:
    """A start with an evaluation on multiple-choice items."""
    return start_of(replace(debug(), eval=EvalConfig(hellaswag_data=data, hellaswag_items=items)))


def test_a_start_that_can_work(commands: Commands, data: Path):
    arguments = ("debug", "--data.dir", str(data), *SETTINGS)
    assert module(commands, "src.preflight", *arguments).returncode == 0
    before = contents(commands.temp_data)  # with the dataset's stamp
    result = module(commands, "src.preflight", *arguments)
    assert result.returncode == 0, result.stderr
    assert contents(commands.temp_data) == before
    lines = result.stderr.splitlines()
    assert all(line.startswith("ok    ") for line in lines)
    assert len({len(line) - len(line[6:].split(":", 1)[1].lstrip()) for line in lines}) == 1, "values in one column"
    assert f"ok    dataset:    {data}, 3,600 tokens in 3 shards" in lines
    summary = json.loads(result.stdout.splitlines()[-1])
    assert (summary["exit_code"], summary["failed"], summary["warnings"]) == (0, [], [])
    assert list(summary["checks"]) == [line[6:].split(":")[0] for line in lines]


def test_all_failures_at_once_and_what_to_do(commands: Commands, tmp_path: Path):
    arguments = ("laptop", "--data.dir", "nowhere", "--eval.hellaswag-data", "nothing.jsonl", "--resume", "7")
    result = module(commands, "src.preflight", *arguments, "--train.micro-batch-size", "5")
    assert result.returncode == 2
    assert json.loads(result.stdout)["failed"] == ["settings", "dataset", "hub", "checkpoint"]
    assert "5 cannot share evenly; with 1 process(es), micro_batch_size can be 1, 2 or 4" in result.stderr
    assert "Cannot read nothing.jsonl: " in result.stderr
    assert f"find a dataset at {tmp_path}/datasets/nowhere: no such folder. Prepare it with: " in result.stderr
    assert "does not exist. Steps with a checkpoint: none." in result.stderr
    assert result.stderr.endswith("4 check(s) failed: settings, dataset, hub, checkpoint\n")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a folder where not even root can write")
def test_storage_alone_has_its_own_exit_code(commands: Commands, data: Path):
    commands.environment["TEMP_DATA_DIR"] = "/proc/nowhere"
    result = module(commands, "src.preflight", "debug", "--data.dir", str(data), *SETTINGS)
    assert result.returncode == 4
    assert "FAIL  folder:     Cannot write in /proc: " in result.stderr


def test_a_run_that_another_process_holds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(files, "PATIENCE_S", 0.1)
    with pytest.raises(BusyError, match=f'"pid": {os.getpid()}, '), claimed(tmp_path / "runs" / "debug"):
        preflight.folder(start_of(debug()))
    assert preflight.folder(start_of(debug())) == f"{tmp_path}/runs/debug, free and writable"


def test_the_launchers_variables(commands: Commands, tmp_path: Path):
    (tmp_path / "texts").mkdir()
    for name in ("one", "two"):
        (tmp_path / "texts" / f"{name}.txt").write_text(name)
    commands.environment |= {"WORLD_SIZE": "4", "NPROC": "2", "STARTED_IN": str(tmp_path), "DATA": "prepare"}
    commands.environment |= {"DATA_SOURCE": "files", "DATA_PATH": "texts\n", "DATA_MAX_TOKENS": "1_000"}
    batch = ("--train.batch-tokens", "16384", "--train.micro-batch-size", "8")
    result = module(commands, "src.preflight", "laptop", *batch)
    assert result.returncode == 0, result.stderr
    assert "ok    settings:   4 process(es) (2 on this machine), micro-batch 8 x 512, 1 accumulation" in result.stderr
    assert f"{tmp_path}/datasets/my_text, to be prepared from files, 2 of them" in result.stderr
    commands.environment["DATA"] = "wait"
    waiting = module(commands, "src.preflight", "laptop", *batch)
    assert waiting.returncode == 0, waiting.stderr
    assert f"{tmp_path}/datasets/my_text, which node 0 prepares" in waiting.stderr


def test_damaged_data(data: Path):
    start = start_of(small(debug()), data)
    assert not isinstance(preflight.dataset(start), Doubt)
    last = shard_paths(data)[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{last}: expected .* --repair"):
        preflight.dataset(start)


def test_data_that_cannot_serve_the_run(data: Path):
    config = small(debug())
    with pytest.raises(UserError, match="At least 200 are needed"):
        preflight.dataset(start_of(replace(config, train=replace(config.train, batch_tokens=3_200)), data))
    narrow = replace(config, model=replace(config.model, n_vocab=299))
    with pytest.raises(UserError, match=r"Set --model\.n-vocab 300"):
        preflight.dataset(start_of(narrow, data))
    with pytest.raises(UserError, match=r"Set --model\.n-vocab 50257"):
        preflight.dataset(start_of(narrow, "new", request("pydocs")))


def test_files_to_prepare_from_that_are_not_there(tmp_path: Path):
    with pytest.raises(UserError, match="does not exist"):
        preflight.dataset(start_of(laptop(), "new", request("files", str(tmp_path / "none"))))


def test_one_disk_for_data_and_checkpoints(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Both must fit: what is needed while the data is prepared, and all checkpoints."""
    start = start_of(lf_llm_269m(), "new", request("fineweb-edu"))
    checkpoints, data = 26_900_000_000, 2 * SOURCES["fineweb-edu"].tokens(request("fineweb-edu")) * 17 // 8

    def check(free: int, start: Start = start) -> str:
        monkeypatch.setattr(preflight, "free_bytes", lambda _: free)
        return preflight.disk(start)

    check(checkpoints + data + 100_000_000)
    with pytest.raises(
        StorageError, match=r"26\.9 GB for checkpoints and at least 42\.. GB for data needed, only 69\.. GB free"
    ):
        check(checkpoints + data - 100_000_000)
    assert "for data" not in check(30_000_000_000, start_of(lf_llm_269m()))
    part = start_of(lf_llm_269m(), "new", request("fineweb-edu", max_tokens=1_000_000_000))
    assert "4.2 GB for data" in check(32_000_000_000, part)


@pytest.mark.skipif(not os.path.ismount("/dev/shm"), reason="needs a second disk")
def test_of_two_disks_the_full_one_is_named(monkeypatch: pytest.MonkeyPatch):
    start = start_of(lf_llm_269m(), "/dev/shm/new", request("fineweb-edu"))
    monkeypatch.setattr(preflight, "free_bytes", lambda path: 10**9 if str(path) == "/dev/shm" else 10**12)
    with pytest.raises(StorageError, match=r"needed, 1\S* TB free at .* for data, only 1\S* GB free at /dev/shm;"):
        preflight.disk(start)


def test_multiple_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "items.jsonl").write_text(3 * (json.dumps(ITEM) + "\n"))
    assert "3 HellaSwag items in " in preflight.hub(asking(str(tmp_path / "items.jsonl")))
    assert preflight.hub(asking("auto", items=0)) == "not needed for HellaSwag"
    monkeypatch.setattr(preflight.hub_settings, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"http://127\.0\.0\.1:9 does not answer\. .* HF_HUB_OFFLINE=1 uses the cached copy"
    ):
        preflight.hub(asking("auto"))
    monkeypatch.setattr(preflight.hub_settings, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        preflight.hub(asking("auto"))
    cached = tmp_path / "cache" / "Rowan___hellaswag" / "default" / "0.0.0" / "a1b2" / "hellaswag-validation.arrow"
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert preflight.hub(asking("auto")) == "HellaSwag is downloaded"


def test_gpus(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    config = on("cuda", replace(lf_llm_269m(), price_per_gpu_hour=1.5), compile="off", precision="bf16")
    text = preflight.device(start_of(config, processes=2))
    assert text.startswith("cuda")
    hours = 19_073 * 524_288 * 2_323_525_632 / (2 * 312e12 * 0.32) / 3600  # 32.3
    assert f"take about 1 d {int(hours) - 24} h, {2 * 1.5 * hours:.2f} dollars at 1.50 per GPU-hour" in text
    with pytest.raises(UserError, match=r"Cannot use CUDA device 3 for process 3 of this machine"):
        preflight.device(start_of(config, processes=4))


def test_a_driver_that_pytorch_cannot_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setattr(preflight, "NVIDIA_DRIVER", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = preflight.device(start_of(debug()))
    assert isinstance(found, Doubt)
    assert "so training runs on the CPU" in found
    assert not isinstance(preflight.device(start_of(on("cpu", debug()))), Doubt)  # as requested


def test_processes_that_cannot_share_a_batch():
    with pytest.raises(ConfigError, match="3 process"):
        preflight.settings(start_of(debug(), processes=3))


def test_a_compiler_that_is_missing_matters_where_something_is_compiled(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(preflight, "compile_problem", lambda kind: "no compiler; install one")
    for compile in ("off", "auto"):  # a CPU compiles nothing unless told to
        assert not isinstance(preflight.device(start_of(on("cpu", debug(), compile=compile))), Doubt)
    with pytest.raises(UserError, match="no compiler; install one, or leave"):
        preflight.device(start_of(on("cpu", debug(), compile="on")))


def test_a_tracker_that_is_not_installed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="wandb"):
        preflight.trackers(start_of(replace(debug(), report_to=("wandb",))))


@pytest.mark.parametrize("name", ["file/cache", "a folder/cache"])
def test_a_folder_for_compiled_code_that_cannot_serve(name: str, commands: Commands, tmp_path: Path):
    """PyTorch makes it when it is imported for training, and ends there; its compiler takes no spaces."""
    (tmp_path / "file").touch()
    commands.environment["TORCHINDUCTOR_CACHE_DIR"] = str(tmp_path / name)
    lines = "import os, src; print(os.environ['TORCHINDUCTOR_CACHE_DIR'])"
    result = commands.run([sys.executable, "-c", lines])
    assert result.returncode == 0, result.stderr
    assert Path(result.stdout.strip()).parent == Path(tempfile.gettempdir())


def test_a_dataset_to_prepare_needs_a_folder_where_it_can_write(data: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(folder: Path) -> None:
        if folder == data:
            raise StorageError(f"Cannot write in {folder}: Read-only file system")

    monkeypatch.setattr(preflight, "check_writable", refuse)
    preflight.folder(start_of(debug(), data))
    with pytest.raises(StorageError):
        preflight.folder(start_of(debug(), data / "new", request("pydocs")))


def test_it_takes_seconds(commands: Commands):
    """It imports nothing slow but PyTorch: a time limit would fail on a busy machine."""
    slow = ("torch", "datasets", "matplotlib", "pyarrow", "pandas", "transformers", "torch._dynamo")
    lines = f"import sys, src.preflight; print([name for name in {slow} if name in sys.modules])"
    assert commands.run([sys.executable, "-c", lines]).stdout == "['torch']\n"


def test_a_dataset_of_another_request(data: Path):
    start = replace(start_of(small(debug()), data), request=request("pydocs", max_tokens=5))
    with pytest.raises(UserError, match="it holds another dataset: source was random, is pydocs; paths was absent"):
        preflight.dataset(start)
