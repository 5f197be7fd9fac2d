"""A download that fails and is tried again, or is killed, ends in the dataset that nothing disturbed.

The real command against a hub on loopback, with parquet files as the real one has them.
"""

import io
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data_processing.preparation import prepare
from src.data_processing.shards import read_manifest
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import all_decoded, contents, request, some_texts, write_json_lines
from tests.data_processing.stand_in_hub import Fault, Hub, hub

REPOSITORY = "HuggingFaceFW/fineweb-edu"
TEXTS = some_texts(1_200, words=300)
# Waits of a few hundredths of a second instead of seconds, and runs of 50,000 tokens instead of 32M.
COMMAND = (
    "from src.data_processing import data_downloader, hub_files, source_runs; from src.utils.errors import exit_with; "
    "hub_files.BASE_DELAY_S = 0.05; source_runs.RUN_TOKENS = 50_000; exit_with(data_downloader.main)"
)


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(map(str, range(len(texts))))}), file, row_group_size=40)
    return file.getvalue()


FILES = {f"sample/10BT/{i:03}_00000.parquet": parquet(TEXTS[i * 200 : i * 200 + 200]) for i in range(6)}
FIRST, SECOND, THIRD, FOURTH, *_ = FILES


def reach(commands: Commands, served: Hub) -> None:
    home = str(commands.temp_data / "hf")
    commands.environment |= {"HF_ENDPOINT": served.address, "HF_HOME": home, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}


def arguments(out: str, *more: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, "--source", "fineweb-edu", "--out", out, *more]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    commands = Commands(tmp_path_factory.mktemp("undisturbed"))
    with hub(REPOSITORY, FILES) as served:
        reach(commands, served)
        done = commands.run(arguments("web"))
    assert done.returncode == 0, done.stderr
    folder = commands.temp_data / "datasets" / "web"
    assert sorted(all_decoded(folder)) == sorted(TEXTS)
    assert served.bytes_sent() == sum(map(len, FILES.values()))
    assert not (commands.temp_data / "hf" / "hub").exists(), "no second copy in the user's cache"
    files = commands.temp_data / "files"
    files.mkdir()
    for path, content in FILES.items():
        (files / Path(path).name).write_bytes(content)
    same = prepare(request(files), commands.temp_data / "from files", 1)
    assert [shard.sha256 for shard in same.shards] == [shard.sha256 for shard in read_manifest(folder).shards]
    return contents(folder)


def test_faults_that_pass(tmp_path: Path, commands: Commands, undisturbed: dict[str, bytes]) -> None:
    faults = {
        FIRST: Fault(2, status=500),
        SECOND: Fault(1, stall_after=20_000),
        THIRD: Fault(2, cut_after=30_000),
        FOURTH: Fault(1, wrong=True),
    }
    with hub(REPOSITORY, FILES, faults) as served:
        reach(commands, served)
        done = commands.run(arguments("web"))
    assert done.returncode == 0, done.stderr
    for path in faults:
        assert f"attempt 2 of 5 for {path} in 0 s" in done.stderr
    assert "attempt 3 of 5" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "datasets" / "web") == undisturbed


def test_kills_at_several_moments(tmp_path: Path, commands: Commands, undisturbed: dict[str, bytes]) -> None:
    total = sum(map(len, FILES.values()))
    with hub(REPOSITORY, FILES, piece_s=0.01) as served:
        reach(commands, served)
        for share in (0.05, 0.35, 0.65, 0.95):
            process = subprocess.Popen(
                arguments("web"),
                cwd=ROOT,
                env=commands.environment,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            while served.bytes_sent() < share * total:
                assert process.poll() is None, "finished before it could be killed"
                time.sleep(0.002)
            process.send_signal(signal.SIGKILL)
            process.wait()
            leftovers = (tmp_path / "datasets" / "web" / ".preparing" / "downloads").glob("*/*.parquet")
            assert all(path.stat().st_size == len(FILES[path.name.replace("--", "/")]) for path in leftovers)
            with pytest.raises(ValueError, match="preparation did not finish"):
                read_manifest(tmp_path / "datasets" / "web")
        done = commands.run(arguments("web"))
    assert done.returncode == 0, done.stderr
    assert "going on after" in done.stderr
    assert contents(tmp_path / "datasets" / "web") == undisturbed
    # What a kill loses is what was under way on four connections: no file is fetched from its start again.
    assert served.bytes_sent() < 1.5 * total
    for path in FILES:
        begun_anew = [request for request in served.stored(path) if (request.range or "").startswith("bytes=0-")]
        assert len(begun_anew) <= 2


@pytest.mark.parametrize(
    ("fault", "token", "message"),
    [
        (Fault(99, wrong=True), None, f"cannot get {SECOND} of {REPOSITORY}"),
        (Fault(99, status=503), None, "after 5 attempts; check the connection"),
        (Fault(0), "hf_secret", "accept the dataset's conditions"),
    ],
)
def test_faults_that_stay(
    tmp_path: Path, commands: Commands, fault: Fault, token: str | None, message: str, undisturbed: dict[str, bytes]
) -> None:
    with hub(REPOSITORY, FILES, {SECOND: fault}, token=token) as served:
        reach(commands, served)
        done = commands.run(arguments("web"))
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "datasets").glob("web/*.npy"))
    with hub(REPOSITORY, FILES, token=token) as mended:
        reach(commands, mended)
        if token:
            commands.environment["HF_TOKEN"] = token
        again = commands.run(arguments("web"))
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "datasets" / "web") == undisturbed
    if not token:
        assert mended.stored(FIRST) == [], "it was there, and whole"


def test_a_part_costs_a_part_and_is_the_same_twice(tmp_path: Path, commands: Commands) -> None:
    with hub(REPOSITORY, FILES) as served:
        reach(commands, served)
        for out in ("a", "b"):
            done = commands.run(arguments(out, "--max-tokens", "40_000"))
            assert done.returncode == 0, done.stderr
    assert contents(tmp_path / "datasets" / "a") == contents(tmp_path / "datasets" / "b")
    manifest = read_manifest(tmp_path / "datasets" / "a")
    assert 39_000 < manifest.counts["tokens"] <= 40_000
    per_file = [
        len(set(all_decoded(tmp_path / "datasets" / "a")) & set(TEXTS[i * 200 : i * 200 + 200])) for i in range(6)
    ]
    assert sum(per_file) == manifest.counts["documents"]
    assert sum(count > 0 for count in per_file) >= 2, "of several files"


def test_kills_of_a_part_at_several_moments(tmp_path: Path, commands: Commands) -> None:
    """While footers come, after one run and after three of row groups, and among the shards, of which there are 100."""
    options = ["--max-tokens", "250_000", "--tokens-per-shard", "2_500"]
    work = tmp_path / "datasets" / "killed" / ".preparing"
    with hub(REPOSITORY, FILES, piece_s=0.02) as served:
        reach(commands, served)
        whole = commands.run(arguments("whole", *options))
        assert whole.returncode == 0, whole.stderr
        before = served.bytes_sent()
        moments: list[Callable[[], bool]] = [
            lambda: served.bytes_sent() > before,
            (work / "run_000000.json").exists,
            (work / "run_000002.json").exists,
            (work / "shards.json").exists,
        ]
        for come in moments:
            process = subprocess.Popen(
                arguments("killed", *options),
                cwd=ROOT,
                env=commands.environment,
                stderr=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
            while not come():
                assert process.poll() is None, "finished before it could be killed"
                time.sleep(0.002)
            process.kill()
            process.wait()
            with pytest.raises(ValueError, match="preparation did not finish"):
                read_manifest(work.parent)
        assert len(list(work.parent.glob("*.npy"))) < 100
        done = commands.run(arguments("killed", *options))
    assert done.returncode == 0, done.stderr
    assert "all documents are tokenised" in done.stderr
    assert "shard(s) that are in" in done.stderr
    assert contents(work.parent) == contents(tmp_path / "datasets" / "whole")
    assert 230_000 < read_manifest(work.parent).counts["tokens"] <= 250_000


def test_more_files_than_are_held_at_once_in_one_run(
    tmp_path: Path, commands: Commands, undisturbed: dict[str, bytes]
) -> None:
    """With runs of the usual size all files fit into one; a repair keeps little of each."""
    usual = [part.replace("source_runs.RUN_TOKENS = 50_000; ", "") for part in arguments("web")]
    with hub(REPOSITORY, FILES) as served:
        reach(commands, served)
        done = commands.run(usual)
        assert done.returncode == 0, done.stderr
        folder = tmp_path / "datasets" / "web"
        assert contents(folder) == undisturbed
        (folder / read_manifest(folder).validation[0].file).unlink()
        done = commands.run([*usual[:3], "--repair", "--out", "web"])
        assert done.returncode == 0, done.stderr
    assert contents(folder) == undisturbed


def test_going_on_behind_the_hub(tmp_path: Path, commands: Commands) -> None:
    """A kill in the second source, when the files of the first are not needed any more."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(40):
        write_json_lines(notes / f"{number:02}.jsonl", some_texts(400, words=100, seed=number))
    with hub(REPOSITORY, FILES) as served:
        reach(commands, served)
        for out in ("killed", "whole"):
            command = arguments(out)
            command[command.index("fineweb-edu") :] = ["fineweb-edu", "files", "--path", str(notes), "--out", out]
            if out == "killed":
                process = subprocess.Popen(command, cwd=ROOT, env=commands.environment, stderr=subprocess.DEVNULL)
                work = tmp_path / "datasets" / out / ".preparing"
                while not any('"next": [1, ' in path.read_text() for path in work.glob("run_*.json")):
                    assert process.poll() is None, "finished before it could be killed"
                    time.sleep(0.002)
                process.kill()
                process.wait()
            done = commands.run(command)
            assert done.returncode == 0, done.stderr
    killed, whole = (contents(tmp_path / "datasets" / out) for out in ("killed", "whole"))
    assert killed == whole


def test_a_repair_uses_the_revision_of_then(tmp_path: Path, commands: Commands) -> None:
    with hub(REPOSITORY, FILES) as served:
        reach(commands, served)
        assert commands.run(arguments("web")).returncode == 0
        folder = tmp_path / "datasets" / "web"
        before = contents(folder)
        (folder / read_manifest(folder).train[0].file).unlink()
        listings = len(served.requests)
        done = commands.run([sys.executable, "-c", COMMAND, "--repair", "--out", "web"])
        assert done.returncode == 0, done.stderr
    assert contents(folder) == before
    assert [request.path for request in served.requests[listings:] if "/api/datasets" in request.path] == []
    assert not (folder / ".preparing").exists()
