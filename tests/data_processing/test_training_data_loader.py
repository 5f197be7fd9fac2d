"""The tokens of a step are a pure function of (seed, step), for any number of processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data_processing import training_data_loader
from src.data_processing.shards import read_manifest
from src.data_processing.training_data_loader import SampleOrder, TrainingDataLoader, WindowDataset
from src.utils.errors import StorageError, UserError
from src.utils.rand_idx_seq_gen import permutation
from src.utils.root import ROOT

N_CTX = 16


@pytest.fixture
def windows(dataset: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> WindowDataset:
    """31, 20 and 50 windows in groups of 10, so 4 + 2 + 5 groups."""
    monkeypatch.setattr(training_data_loader, "GROUP_TOKENS", 10 * N_CTX)
    folder = dataset(train_tokens=[500, 333, 801])
    return WindowDataset(folder, read_manifest(folder).train, N_CTX, 50_257, at_least=4)


def loader(windows: WindowDataset, *, first: int = 0, rank: int = 0, world_size: int = 1, micro: int = 2):
    sizes = {"batch_size": 8, "micro_batch_size": micro, "rank": rank, "world_size": world_size}
    return TrainingDataLoader(windows, seed=7, device=torch.device("cpu"), first_step=first, **sizes)


def batches(windows: WindowDataset, steps: int, *, world_size: int = 1, micro: int = 2, **options: int):
    opened = loader(windows, world_size=world_size, micro=micro, **options)
    return list(islice(opened, steps * 8 // world_size // micro))


def test_windows_hold_the_shards_tokens(windows: WindowDataset):
    """Every window is at its place in its file, as numpy reads it."""
    files = [np.load(path) for path in windows.paths]
    places = [(shard, start) for shard, file in enumerate(files) for start in range(0, len(file) - 16, 16)]
    assert windows.n_windows == len(places) == 499 // 16 + 332 // 16 + 800 // 16
    for number, (shard, start) in enumerate(places):
        np.testing.assert_array_equal(windows[number], files[shard][start : start + 17])


def test_an_epoch_holds_every_window_once_and_the_next_has_another_order(windows: WindowDataset):
    order = SampleOrder(windows.windows_per_shard, 10, seed=7)
    first = [order[i] for i in range(101)]
    second = [order[i] for i in range(101, 202)]
    assert [group for group, _ in first] != [group for group, _ in second]
    places = [(shard, start + window) for (shard, start, _), window in first]
    assert sorted(places) == [(shard, i) for shard, n in enumerate((31, 20, 50)) for i in range(n)]
    assert sorted(first) == sorted(second)


def test_the_order_is_the_one_that_is_documented(windows: WindowDataset):
    """The definition in the module's docstring, written out. Another order would change every run."""
    groups = [(0, 10), (10, 10), (20, 10), (30, 1), (31, 10), (41, 10), *((start, 10) for start in range(51, 101, 10))]
    expected = [
        groups[g][0] + w
        for epoch in range(2)
        for g in permutation(len(groups), 7, epoch, 0)
        for w in permutation(groups[g][1], 7, epoch, 1 + int(g))
    ]
    delivered = torch.cat([inputs for inputs, _ in batches(windows, 25)]).numpy()
    np.testing.assert_array_equal(delivered, [windows[number][:-1] for number in expected[:200]])


def test_an_epoch_reads_every_group_once_and_in_one_piece(windows: WindowDataset, monkeypatch: pytest.MonkeyPatch):
    reads: list[tuple[int, ...]] = []
    read = windows.read

    def spy(shard: int, first: int, tokens: np.ndarray) -> None:
        reads.append((shard, first, (len(tokens) - 1) // N_CTX))
        read(shard, first, tokens)

    monkeypatch.setattr(windows, "read", spy)
    batches(windows, 13)  # 104 windows, past the epoch's 101
    order = SampleOrder(windows.windows_per_shard, 10, seed=7)
    assert len(order.groups) == 11
    assert sorted(reads[:11]) == order.groups


def test_a_dataset_of_one_group_is_shuffled_as_a_whole():
    order = SampleOrder(np.array([1000]), 1000, seed=7)
    jumps = np.abs(np.diff([order[i][1] for i in range(1000)]))
    assert jumps.mean() == pytest.approx(1000 / 3, rel=0.1)  # the mean distance of two random places


@pytest.mark.parametrize(("world_size", "micro"), [(1, 2), (1, 8), (2, 2), (4, 1), (8, 1)])
def test_the_windows_of_a_step_are_those_that_all_processes_get(windows: WindowDataset, world_size: int, micro: int):
    """Read from the files of the whole dataset with its manifest alone. So a step is the same for all processes."""
    folder = windows.paths[0].parent
    manifest = read_manifest(folder)
    files = [np.load(folder / shard.file) for shard in manifest.shards]
    share, micro_batches = 8 // world_size, 8 // world_size // micro
    for rank in range(world_size):
        yielded = batches(windows, 15, rank=rank, world_size=world_size, micro=micro)  # past the first epoch's end
        opened = loader(windows, first=14, rank=rank, world_size=world_size, micro=micro)
        parts = {step: opened.step_windows(step)[rank * share : (rank + 1) * share] for step in (0, 3, 12, 13, 14)}
        for step, places in parts.items():
            starts = [(files[len(manifest.validation) + shard], window * N_CTX) for shard, window in places]
            expected = np.array([file[start : start + N_CTX + 1] for file, start in starts])
            own = yielded[step * micro_batches : (step + 1) * micro_batches]
            assert all(batch.dtype == torch.int64 and batch.shape == (micro, N_CTX) for pair in own for batch in pair)
            np.testing.assert_array_equal(torch.cat([inputs for inputs, _ in own]), expected[:, :-1])
            np.testing.assert_array_equal(torch.cat([targets for _, targets in own]), expected[:, 1:])


def test_starting_at_a_step_gives_what_an_uninterrupted_reader_gets(windows: WindowDataset):
    whole = batches(windows, 20)
    for (inputs, targets), (expected, expected_targets) in zip(batches(windows, 5, first=15), whole[60:], strict=True):
        torch.testing.assert_close(inputs, expected)
        torch.testing.assert_close(targets, expected_targets)


def test_a_shard_that_goes_away_while_it_is_trained_on(windows: WindowDataset):
    os.truncate(windows.paths[2], windows.paths[2].stat().st_size - 1)
    with pytest.raises(StorageError, match=rf"Cannot read {windows.paths[2]}: it became shorter while in use"):
        batches(windows, 15)
    windows.paths[2].unlink()
    with pytest.raises(StorageError, match=rf"Cannot read {windows.paths[2]}: No such file"):
        batches(windows, 15)


def test_too_little_data_for_one_batch(dataset: Callable[..., Path]):
    folder = dataset(train_tokens=[40])
    with pytest.raises(UserError, match=r"holds 40 tokens, which is 2 windows .* At least 4 are needed, or 65 tokens"):
        WindowDataset(folder, read_manifest(folder).train, N_CTX, 50_257, at_least=4)
    with pytest.raises(UserError, match=r"Use more text or a model with a smaller n_ctx\.$"):
        WindowDataset(folder, read_manifest(folder).train, 64, 50_257, at_least=1)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_ten_billion_tokens_take_little_memory_and_are_read_once():
    """Measured by the benchmark in a separate process. Speed depends on the machine, so it is not judged here."""
    command = [sys.executable, "-m", "benchmarks.loader", "--n-ctx", "256", "--seconds", "0.5"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=True)
    (figures,) = json.loads(result.stdout)["loader"]
    assert figures["dataset_tokens"] == 9_900_000_000
    assert 16 < figures["VmRSS_mb_above_imports"] < 100
    assert 2.0 <= figures["bytes_read_per_token"] < 3.2  # two bytes a token, and a group that was just begun
    assert figures["mean_read_kb"] > 1_000
