"""Files of a hub arrive whole, each byte once, whatever the hub, the network, the disk or a kill does."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from src.data_processing import hub_downloads
from src.data_processing.hub_files import HubFile, HubListing
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing import hub_client
from tests.data_processing.stand_in_hub import REVISION, Fault, Hub, hub

CLIENT = hub_client.__name__
SIZE = 200_000
PATHS = [f"{hub_client.FOLDER}/{i:03}_00000.parquet" for i in range(5)]
FILES = {path: random.Random(path).randbytes(SIZE) for path in PATHS}
SHA256 = [hashlib.sha256(content).hexdigest() for content in FILES.values()]


@pytest.fixture
def reach(tmp_path: Path, commands: Commands) -> Callable[[Hub], Commands]:
    def set_up(served: Hub) -> Commands:
        commands.environment |= {
            "HF_ENDPOINT": served.address,
            "HF_HOME": str(tmp_path / "hf"),
            "HF_HUB_DOWNLOAD_TIMEOUT": "1",
        }
        return commands

    return set_up


def lines(done: subprocess.CompletedProcess[str]) -> list[dict]:
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def downloads(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in (folder / "downloads" / REVISION).iterdir()}


def local_name(path: str) -> str:
    return path.replace("/", "--")


def test_every_byte_once_and_few_files_at_a_time(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    with hub(hub_client.REPOSITORY, FILES, piece_s=0.01) as served:
        done = reach(served).module(CLIENT, "files", str(tmp_path), "3", "0")
    found = lines(done)
    assert done.stderr == ""
    assert [line["sha256"] for line in found] == SHA256
    assert [served.bytes_sent(path) for path in PATHS] == [SIZE] * 5
    assert all(len(line["there"]) <= 3 for line in found)
    assert downloads(tmp_path) == {}, "the caller is done with all of them"
    assert (found[-1]["bytes_there"], found[-1]["bytes_total"], found[-1]["files_there"]) == (5 * SIZE, 5 * SIZE, 5)
    assert 0 < found[0]["bytes_per_s"] < 3 * 2**14 / 0.01, "faster than the hub sends"
    begun = [PATHS.index(r.path.removeprefix("/storage/")) for r in served.requests if "/storage/" in r.path]
    assert (sorted(begun[:3]), sorted(begun[3:])) == ([0, 1, 2], [3, 4])


def test_a_slow_caller_makes_no_slow_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """20 pieces in a second, for which the caller waits, and a second in which the next file must not begin."""

    def slowly(listing: HubListing, file: HubFile, start: int, end: int) -> Iterator[bytes]:
        for _ in range(20):
            time.sleep(0.05)
            yield bytes((end - start) // 20)

    monkeypatch.setattr(hub_downloads, "read_range", slowly)
    listing = HubListing("org/data", REVISION, tuple(HubFile(path, 20_000, None) for path in PATHS))
    with hub_downloads.Downloads(listing, tmp_path, parallel=1) as downloads:
        downloads.path(0)
        time.sleep(1)
        found = downloads.progress()
        assert (found.bytes_there, found.bytes_total) == (20_000, 100_000)
        assert 15_000 < found.bytes_per_s <= 20_000
        assert 1.0 <= found.waited_s < 1.4
        assert found.bytes_per_s == downloads.progress().bytes_per_s, "asked for again at once"


def test_a_later_start_leaves_out_what_the_caller_has(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    with hub(hub_client.REPOSITORY, FILES) as served:
        lines(reach(served).module(CLIENT, "files", str(tmp_path), "0", "0"))
        found = lines(reach(served).module(CLIENT, "files", str(tmp_path), "2", "3"))
    assert [line["sha256"] for line in found] == SHA256[3:]
    assert len(found[0]["there"]) == 2, "files 0 to 2 are deleted"
    assert found[0]["bytes_there"] == 5 * SIZE
    assert served.bytes_sent() == 5 * SIZE


def test_faults_that_pass(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    expected = [
        (Fault(4, status=500), "attempt 5 of 5 for {path} in 0 s: HTTP 500 Internal Server Error", SIZE),
        (Fault(1, status=429, headers={"Retry-After": "1"}), "attempt 2 of 5 for {path} in 1 s: HTTP 429", SIZE),
        (Fault(1, status=429, headers={"RateLimit": '"resolvers";r=0;t=1'}), "for {path} in 1 s: HTTP 429", SIZE),
        (Fault(1, status=403), "for {path} in 0 s: HTTP 403", SIZE),  # a refusal of the storage, not of the hub
        (Fault(2, stall_after=10_000), "attempt 3 of 5 for {path} in 0 s: ReadTimeout", SIZE),
        (Fault(4, cut_after=10_000), "attempt 5 of 5 for {path} in 0 s: RemoteProtocolError: peer closed", SIZE),
        (Fault(9, cut_after=20_000), "attempt 2 of 5 for {path}", SIZE),  # each time a worthwhile part
        (Fault(1, wrong=True), "for {path} in 0 s: the content's sha256 is", 2 * SIZE),
    ]
    files = {f"{hub_client.FOLDER}/{i}.parquet": FILES[PATHS[0]] for i in range(len(expected))}
    faults = {path: fault for path, (fault, _, _) in zip(files, expected, strict=True)}
    start = time.monotonic()
    with hub(hub_client.REPOSITORY, files, faults) as served:
        done = reach(served).module(CLIENT, "files", str(tmp_path), "0", "0")
    assert [line["sha256"] for line in lines(done)] == [SHA256[0]] * len(expected)
    assert time.monotonic() - start > 2, "two stalls of a second, noticed"
    assert downloads(tmp_path) == {local_name(path): SIZE for path in files}
    for path, (_, said, sent) in zip(files, expected, strict=True):
        assert said.replace("{path}", path) in done.stderr
        assert sum(request.body_bytes for request in served.stored(path) if request.body_bytes > 1_000) == sent


def test_a_server_that_knows_no_ranges(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    partial = tmp_path / "downloads" / REVISION / f"{local_name(PATHS[0])}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(FILES[PATHS[0]][:70_000])
    with hub(hub_client.REPOSITORY, FILES, {PATHS[0]: Fault(1, whole=True)}) as served:
        done = reach(served).module(CLIENT, "files", str(tmp_path), "0", "0")
    assert [line["sha256"] for line in lines(done)] == SHA256
    assert [request.range for request in served.stored(PATHS[0])] == [f"bytes=70000-{SIZE - 1}"]
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        pytest.param(Fault(99, status=503), "HTTP 503 Service Unavailable", id="503"),
        pytest.param(Fault(99, wrong=True), "the content's sha256 is", id="wrong content"),
    ],
)
def test_faults_that_last(tmp_path: Path, reach: Callable[[Hub], Commands], fault: Fault, reason: str) -> None:
    path = PATHS[1]
    with hub(hub_client.REPOSITORY, FILES, {path: fault}) as served:
        done = reach(served).module(CLIENT, "files", str(tmp_path), "0", "0")
    assert done.returncode == 2
    assert len(served.stored(path)) == 5
    assert f"cannot get {path} of org/data from {served.address} ({reason}" in done.stderr
    assert "after 5 attempts; check the connection" in done.stderr
    assert "the same command goes on from here" in done.stderr
    assert "Traceback" not in done.stderr
    assert local_name(path) not in downloads(tmp_path)


def test_a_file_that_is_gone(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    with hub(hub_client.REPOSITORY, dict(FILES)) as served:
        lines(reach(served).module(CLIENT, "files", str(tmp_path), "5", "4"))  # for the listing
        del served.files[PATHS[0]]
        done = reach(served).module(CLIENT, "files", str(tmp_path), "1", "0")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert f"cannot get {PATHS[0]} of org/data" in done.stderr
    assert f"it is gone or never was there; look at {served.address}/datasets/org/data" in done.stderr


@pytest.mark.parametrize("killed_after", [0.05, 0.5, 0.95])
def test_a_kill(tmp_path: Path, reach: Callable[[Hub], Commands], killed_after: float) -> None:
    """After a share of all bytes. The next start fetches no finished file again, and of the others the rest."""
    command = [sys.executable, "-m", CLIENT, "files", str(tmp_path), "0", "0"]
    with hub(hub_client.REPOSITORY, FILES, piece_s=0.005) as served:
        environment = reach(served).environment
        with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL) as process:
            while served.bytes_sent() < killed_after * 5 * SIZE:
                time.sleep(0.002)
            process.kill()
        left = downloads(tmp_path)
        for path in PATHS:
            assert left.get(local_name(path), SIZE) == SIZE, "a part of a file under a final name"
        before = len(served.requests)
        found = lines(reach(served).run(command))
    assert [line["sha256"] for line in found] == SHA256
    for path in PATHS:
        again = [r.range for r in served.requests[before:] if r.path == f"/storage/{path}"]
        there = left.get(local_name(path), left.get(f"{local_name(path)}.partial", 0))
        assert again == ([f"bytes={there}-{SIZE - 1}"] if there < SIZE else [])


def test_everything_there_needs_no_network(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    with hub(hub_client.REPOSITORY, FILES) as served:
        lines(reach(served).module(CLIENT, "files", str(tmp_path), "0", "0"))
        asked = len(served.requests)
        offline = reach(served)
        offline.environment["HF_HUB_OFFLINE"] = "1"
        found = lines(offline.module(CLIENT, "files", str(tmp_path), "0", "0"))
        assert len(served.requests) == asked
    assert [line["sha256"] for line in found] == SHA256


def test_a_file_of_another_size_is_fetched_again(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    with hub(hub_client.REPOSITORY, FILES) as served:
        lines(reach(served).module(CLIENT, "files", str(tmp_path), "0", "0"))
        os.truncate(tmp_path / "downloads" / REVISION / local_name(PATHS[2]), 1_000)
        found = lines(reach(served).module(CLIENT, "files", str(tmp_path), "0", "0"))
    assert [line["sha256"] for line in found] == SHA256
    assert [served.bytes_sent(path) for path in PATHS] == [SIZE, SIZE, 2 * SIZE, SIZE, SIZE]


def test_the_users_own_cache_is_used_in_place(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    fetch = "import sys; from huggingface_hub import hf_hub_download as get; "
    fetch += f"[get('{hub_client.REPOSITORY}', path, repo_type='dataset') for path in sys.argv[1:]]"
    cached = tmp_path / "hf" / "hub" / "datasets--org--data" / "snapshots" / REVISION
    with hub(hub_client.REPOSITORY, FILES) as served:
        commands = reach(served)
        assert commands.run([sys.executable, "-c", fetch, *PATHS[:2]]).returncode == 0
        damaged = (cached / PATHS[1]).resolve()
        damaged.write_bytes(b"?" * SIZE)
        served.requests.clear()
        found = lines(commands.module(CLIENT, "files", str(tmp_path), "2", "0"))
    assert [line["sha256"] for line in found] == SHA256
    assert found[0]["path"] == str(cached / PATHS[0])
    assert found[1]["path"] != str(cached / PATHS[1])
    assert [served.bytes_sent(path) for path in PATHS] == [0, SIZE, SIZE, SIZE, SIZE]
    assert (cached / PATHS[0]).read_bytes() == FILES[PATHS[0]]
    assert damaged.read_bytes() == b"?" * SIZE


def test_a_full_disk(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    """On a file system of 256 KiB, which a user may mount in a namespace of their own where the kernel allows that."""
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", "true"], check=False).returncode:
        pytest.skip("this machine gives users no namespaces of their own")
    script = f'mount -t tmpfs -o size=256k tmpfs {tmp_path}/small && exec "$@"'
    (tmp_path / "small").mkdir()
    with hub(hub_client.REPOSITORY, FILES) as served:
        client = [sys.executable, "-m", CLIENT, "files", str(tmp_path / "small"), "0", "0"]
        done = reach(served).run(["unshare", "-rm", "sh", "-c", script, "sh", *client])
    assert done.returncode == 4, done.stderr
    assert ".partial: No space left on device; " in done.stderr
    assert "bytes more are needed, 0 are free; make room" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_file_that_cannot_get_its_name_is_said_once(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    """What is in the way is a folder of that name: that stops the superuser too."""
    target = tmp_path / "downloads" / REVISION / local_name(PATHS[0])
    (target / "in the way").mkdir(parents=True)
    with hub(hub_client.REPOSITORY, FILES) as served:
        done = reach(served).module(CLIENT, "files", str(tmp_path), "1", "0")
    assert done.returncode == 4, done.stderr
    assert f"error: cannot write {target}.partial: Is a directory; move the folder of that name" in done.stderr
    assert done.stderr.count("cannot ") == 1


def test_stopping_waits_for_no_download(tmp_path: Path, reach: Callable[[Hub], Commands]) -> None:
    faults = {path: Fault(1, stall_after=50_000) for path in PATHS}
    with hub(hub_client.REPOSITORY, FILES, faults) as served:
        environment = reach(served).environment | {"HF_HUB_DOWNLOAD_TIMEOUT": "60"}
        command = [sys.executable, "-m", CLIENT, "files", str(tmp_path), "0", "0"]
        with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
            while served.bytes_sent() < 5 * 50_000:
                time.sleep(0.01)
            start = time.monotonic()
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=30)[1] == "interrupted\n"
            assert time.monotonic() - start < 3
            assert process.returncode == 130
