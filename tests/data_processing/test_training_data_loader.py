"""Which tokens a step trains on."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from src.data_processing.shards import read_manifest
from src.data_processing.training_data_loader import SampleOrder, TrainingDataLoader, WindowDataset, stray_files
from src.utils.errors import UserError

N_CTX = 16


@pytest.fixture
def windows(dataset: Callable[..., Path]) -> WindowDataset:
    folder = dataset(train_tokens=[500, 333, 801])
    return WindowDataset(folder, read_manifest(folder).train, N_CTX, 50_257, at_least=4)


def batches(windows: WindowDataset, steps: int, *, first: int = 0, rank: int = 0, world_size: int = 1, micro: int = 2):
    with TrainingDataLoader(
        windows,
        seed=7,
        batch_size=8,
        micro_batch_size=micro,
        rank=rank,
        world_size=world_size,
        device=torch.device("cpu"),
        first_step=first,
    ) as loader:
        return list(islice(loader, steps * 8 // world_size // micro))


def test_targets_are_the_next_tokens(windows: WindowDataset):
    for inputs, targets in batches(windows, 3):
        assert inputs.dtype == targets.dtype == torch.int64
        assert inputs.shape == targets.shape == (2, N_CTX)
        torch.testing.assert_close(inputs[:, 1:], targets[:, :-1])


def test_windows_hold_the_shards_tokens(windows: WindowDataset, dataset: Callable[..., Path]):
    """Every window is found at its place in its file, read anew with numpy."""
    files = [np.load(shard.filename) for shard in windows._shards]
    assert windows.n_windows == 499 // 16 + 332 // 16 + 800 // 16
    for shard, file in enumerate(files):
        for index in range(windows.windows_per_shard[shard]):
            np.testing.assert_array_equal(windows.window(shard, index), file[index * 16 : index * 16 + 17])
    np.testing.assert_array_equal(windows[31], windows.window(1, 0))


def test_an_epoch_holds_every_window_once_and_the_next_is_shuffled_anew(windows: WindowDataset):
    order = SampleOrder(windows.windows_per_shard, seed=7)
    n = windows.n_windows
    first = [order[i] for i in range(n)]
    second = [order[i] for i in range(n, 2 * n)]
    assert sorted(first) == sorted(second) == [(s, w) for s in range(3) for w in range(windows.windows_per_shard[s])]
    assert first != second


def test_order_is_a_pure_function_of_seed_and_number(windows: WindowDataset):
    order, again = (SampleOrder(windows.windows_per_shard, seed=7) for _ in range(2))
    numbers = np.random.default_rng(0).permutation(400)
    jumping = {int(i): again[int(i)] for i in numbers}
    assert [order[i] for i in range(400)] == [jumping[i] for i in range(400)]
    assert [order[i] for i in range(50)] != [SampleOrder(windows.windows_per_shard, seed=8)[i] for i in range(50)]


@pytest.mark.parametrize(("world_size", "micro"), [(2, 2), (4, 1), (1, 8), (8, 1)])
def test_global_batches_are_the_same_for_any_number_of_processes(windows: WindowDataset, world_size: int, micro: int):
    steps = 15  # past the end of the first epoch of 101 windows
    alone = torch.cat([inputs for inputs, _ in batches(windows, steps)]).view(steps, 8, N_CTX)
    parts = [
        torch.cat([i for i, _ in batches(windows, steps, rank=r, world_size=world_size, micro=micro)])
        for r in range(world_size)
    ]
    together = torch.cat([part.view(steps, 8 // world_size, N_CTX) for part in parts], dim=1)
    torch.testing.assert_close(together, alone)


def test_starting_at_a_step_gives_what_an_uninterrupted_reader_gets(windows: WindowDataset):
    whole = batches(windows, 20)
    for (inputs, targets), (expected, expected_targets) in zip(batches(windows, 5, first=15), whole[60:], strict=True):
        torch.testing.assert_close(inputs, expected)
        torch.testing.assert_close(targets, expected_targets)


def test_an_error_while_reading_reaches_the_caller(windows: WindowDataset, monkeypatch: pytest.MonkeyPatch):
    def fail(*_: int) -> np.ndarray:
        raise OSError("the disk went away")

    monkeypatch.setattr(windows, "window", fail)
    with pytest.raises(OSError, match="the disk went away"):
        batches(windows, 1)


def test_too_little_data_for_one_batch(dataset: Callable[..., Path]):
    folder = dataset(train_tokens=[40])
    with pytest.raises(UserError, match=r"holds 40 tokens: 2 windows .* takes 4 windows, about 64 tokens"):
        WindowDataset(folder, read_manifest(folder).train, N_CTX, 50_257, at_least=4)


def test_a_stray_file_is_mentioned_and_ignored(dataset: Callable[..., Path]):
    folder = dataset(train_tokens=[400])
    assert stray_files(folder, read_manifest(folder)) is None
    (folder / "notes.npy").write_bytes(b"not tokens")
    assert "notes.npy" in (stray_files(folder, read_manifest(folder)) or "")
    assert WindowDataset(folder, read_manifest(folder).train, N_CTX, 50_257, at_least=4).n_windows == 24
