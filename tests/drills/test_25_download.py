"""Drill 25: a download that fails, stalls or is killed ends in the same dataset as an undisturbed one.

Runs the real command against a stand-in hub on loopback, with parquet files like the real ones.
"""

import io
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.data_processing.data_downloader import prepare
from src.data_processing.shards import read_manifest
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import all_decoded, contents, request, some_texts, write_json_lines
from tests.data_processing.stand_in_hub import Fault, Hub, hub

REPOSITORY = "HuggingFaceFW/fineweb-edu"
TEXTS = some_texts(1_200, words=300)
# Waits of some hundredths of a second instead of seconds, and progress recorded every 50,000 tokens instead of 64M.
COMMAND = (
    "from src.data_processing import data_downloader, hub_dataset, document_shuffle; "
    "from src.utils.errors import exit_with; "
    "hub_dataset.BASE_DELAY_S = 0.05; document_shuffle.FLUSH_TOKENS = 50_000; exit_with(data_downloader.main)"
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
        assert f"Attempt 2 of 5 for {path} in 0 s" in done.stderr
    assert "Attempt 3 of 5" in done.stderr
    assert "Traceback" not in done.stderr
    assert contents(tmp_path / "datasets" / "web") == undisturbed


def test_kills_at_several_moments(tmp_path: Path, commands: Commands, undisturbed: dict[str, bytes]) -> None:
    total = sum(map(len, FILES.values()))
    with hub(REPOSITORY, FILES, piece_s=0.01) as served:
        reach(commands, served)
        for share in (0.2, 0.8):
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
    assert "resuming after" in done.stderr
    assert contents(tmp_path / "datasets" / "web") == undisturbed
    # A kill loses what was on its way. A file is fetched again only if it was read and the progress not yet recorded.
    assert served.bytes_sent() < 2 * total


def test_a_fault_that_lasts(tmp_path: Path, commands: Commands, undisturbed: dict[str, bytes]) -> None:
    with hub(REPOSITORY, FILES, {SECOND: Fault(99, status=503)}) as served:
        reach(commands, served)
        done = commands.run(arguments("web"))
    assert done.returncode == 2
    assert f"Cannot get {SECOND} of {REPOSITORY} from {served.address} after 5 attempts: HTTP 503" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list((tmp_path / "datasets").glob("web/*.npy"))
    with hub(REPOSITORY, FILES) as mended:
        reach(commands, mended)
        again = commands.run(arguments("web"))
    assert again.returncode == 0, again.stderr
    assert contents(tmp_path / "datasets" / "web") == undisturbed
    assert mended.stored(FIRST) == [], "it was complete"


def test_kills_of_a_part_at_several_moments(tmp_path: Path, commands: Commands) -> None:
    """While footers arrive, after 50,000 tokens, and among the shards, of which there are 100."""
    options = ["--max-tokens", "250_000", "--tokens-per-shard", "2_500"]
    work = tmp_path / "datasets" / "killed" / ".preparing"
    with hub(REPOSITORY, FILES, piece_s=0.02) as served:
        reach(commands, served)
        whole = commands.run(arguments("whole", *options))
        assert whole.returncode == 0, whole.stderr
        before = served.bytes_sent()
        moments: list[Callable[[], bool]] = [
            lambda: served.bytes_sent() > before,
            (work / "journal.json").exists,
            lambda: len(list(work.parent.glob("*.npy"))) > 2,
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
    assert re.search(r"[1-9]\d* shards are written", done.stderr)
    assert contents(work.parent) == contents(tmp_path / "datasets" / "whole")
    manifest = read_manifest(work.parent)
    assert 230_000 < manifest.counts["tokens"] <= 250_000
    taken = set(all_decoded(work.parent))
    per_file = [len(taken & set(TEXTS[i * 200 : i * 200 + 200])) for i in range(6)]
    assert sum(per_file) == manifest.counts["documents"]
    assert sum(count > 0 for count in per_file) >= 4, "a random part has documents of most files"


def test_resuming_behind_the_hub(tmp_path: Path, commands: Commands) -> None:
    """A kill in the second source, when the files of the first are no longer needed."""
    notes = tmp_path / "notes"
    notes.mkdir()
    for number in range(12):
        write_json_lines(notes / f"{number:02}.jsonl", some_texts(400, words=100, seed=number))
    with hub(REPOSITORY, FILES) as served:
        reach(commands, served)
        for out in ("killed", "whole"):
            command = arguments(out)
            command[command.index("fineweb-edu") :] = ["fineweb-edu", "files", "--path", str(notes), "--out", out]
            if out == "killed":
                process = subprocess.Popen(command, cwd=ROOT, env=commands.environment, stderr=subprocess.DEVNULL)
                work = tmp_path / "datasets" / out / ".preparing"
                while not any('"position": [1, ' in path.read_text() for path in work.glob("journal.json")):
                    assert process.poll() is None, "finished before it could be killed"
                    time.sleep(0.002)
                process.kill()
                process.wait()
            done = commands.run(command)
            assert done.returncode == 0, done.stderr
    killed, whole = (contents(tmp_path / "datasets" / out) for out in ("killed", "whole"))
    assert killed == whole


def test_a_repair_uses_the_revision_of_then(tmp_path: Path, commands: Commands, undisturbed: dict[str, bytes]) -> None:
    """Without a kill and with more files than are held at once."""
    usual = [part.replace("document_shuffle.FLUSH_TOKENS = 50_000; ", "") for part in arguments("web")]
    with hub(REPOSITORY, FILES) as served:
        reach(commands, served)
        assert commands.run(usual).returncode == 0
        folder = tmp_path / "datasets" / "web"
        assert contents(folder) == undisturbed
        (folder / read_manifest(folder).train[0].file).unlink()
        listings = len(served.requests)
        done = commands.run([*usual[:3], "--repair", "--out", "web"])
        assert done.returncode == 0, done.stderr
    assert contents(folder) == undisturbed
    assert [request.path for request in served.requests[listings:] if "/api/datasets" in request.path] == []
    assert not (folder / ".preparing").exists()
