"""Batches of token ids from a dataset's shards, in an order that is a pure function of (seed, step).

- A *window* is n_ctx + 1 consecutive tokens of a shard. Neighbouring windows overlap by one token, so an epoch
  predicts each token once, except a shard's first token and the remainder at its end that fills no window.
- A *group* is GROUP_TOKENS // n_ctx consecutive windows of a shard, fewer at its end. The loader reads a group in
  one piece and holds one group at a time, so reads are long and memory stays small for a dataset of any size.

Number the groups shard by shard in the manifest's order, and let permutation(n, seed, ...) be the function in
src/utils/rand_idx_seq_gen.py. Epoch e visits the groups in the order permutation(groups, seed, e, 0), and the
windows of group g in the order permutation(windows of g, seed, e, 1 + g). Sequence j of step s is number
s * batch_size + j of that order, counted over all epochs, for any number of processes. Each process takes its
share of a step. The loader's whole state is therefore a step number, and resuming costs two permutations.

Windows are shuffled within 8M tokens. That is enough, because a dataset's documents already lie in random order.
Shapes: B sequences, T positions.
"""

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from src.data_processing.shards import TOKEN_DTYPE, Shard, check_shard
from src.utils.errors import StorageError, UserError
from src.utils.files import storage_errors
from src.utils.rand_idx_seq_gen import permutation

# 16 MiB: a disk's seek or a network's round trip is cheap by comparison. Another value changes the order.
GROUP_TOKENS = 1 << 23


class WindowDataset:
    """The windows of some shards of a dataset. Files are open only during a read.

    Raises UserError for a dataset that is damaged or too small, and StorageError if a later read fails.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...], n_ctx: int, n_vocab: int, at_least: int) -> None:
        """Check the shards' headers. `at_least`: windows that the caller needs. `n_vocab`: the model's."""
        for shard in shards:
            check_shard(folder, shard, n_vocab)
        self.n_ctx = n_ctx
        self.paths = [folder / shard.file for shard in shards]
        token_bytes = [shard.tokens * TOKEN_DTYPE.itemsize for shard in shards]
        self._header_bytes = [path.stat().st_size - size for path, size in zip(self.paths, token_bytes, strict=True)]
        self.windows_per_shard = np.array([max(0, shard.tokens - 1) // n_ctx for shard in shards])
        self._ends = np.cumsum(self.windows_per_shard)
        self.n_windows = int(self.windows_per_shard.sum())
        if self.n_windows < at_least:
            tokens = sum(shard.tokens for shard in shards)
            split = shards[0].split if shards else "training"
            raise UserError(
                f"Cannot use the {split} part of {folder}: it holds {tokens} tokens, which is {self.n_windows} windows "
                f"of n_ctx + 1 = {n_ctx + 1}. At least {at_least} are needed, or {at_least * n_ctx + 1} tokens. "
                f"Use more text or a {'model with a smaller n_ctx' if at_least == 1 else 'smaller train.batch_tokens'}."
            )

    def __getitem__(self, number: int) -> np.ndarray:
        """Window `number` in reading order over all shards: n_ctx + 1 token ids, uint16."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        tokens = np.empty(self.n_ctx + 1, TOKEN_DTYPE)
        self.read(shard, number - int(self._ends[shard] - self.windows_per_shard[shard]), tokens)
        return tokens

    def read(self, shard: int, first: int, tokens: np.ndarray) -> None:
        """Fill `tokens`, uint16, with the token ids of shard `shard` that start at its window `first`."""
        path = self.paths[shard]
        with storage_errors(path, "read"), open(path, "rb") as file:
            file.seek(self._header_bytes[shard] + first * self.n_ctx * TOKEN_DTYPE.itemsize)
            if file.readinto(tokens.data) < tokens.nbytes:
                raise StorageError(f"Cannot read {path}: it became shorter while in use. Prepare the dataset again.")


class SampleOrder:
    """The window of each sequence number of a training run."""

    def __init__(self, windows_per_shard: np.ndarray, windows_per_group: int, seed: int) -> None:
        self.epoch_length = int(windows_per_shard.sum())
        self.seed = seed
        self.groups = [
            (shard, first, min(windows_per_group, windows - first))
            for shard, windows in enumerate(windows_per_shard.tolist())
            for first in range(0, windows, windows_per_group)
        ]
        """Shard, first window and number of windows of each group."""

        # An epoch visits one group after the other, so only the current orders are cached.
        self._group_order = lru_cache(maxsize=2)(self._make_group_order)
        self._window_order = lru_cache(maxsize=2)(
            lambda epoch, group: permutation(self.groups[group][2], seed, epoch, 1 + group)
        )

    def __getitem__(self, number: int) -> tuple[tuple[int, int, int], int]:
        """The entry of `groups` for sequence `number`, counted over all epochs, and the window inside the group."""
        epoch, position = divmod(number, self.epoch_length)
        groups, starts = self._group_order(epoch)
        turn = int(np.searchsorted(starts, position, side="right")) - 1
        group = int(groups[turn])
        return self.groups[group], int(self._window_order(epoch, group)[position - starts[turn]])

    def _make_group_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of groups, and the position at which each one starts."""
        groups = permutation(len(self.groups), self.seed, epoch, 0)
        sizes = np.array([windows for _, _, windows in self.groups])[groups]
        return groups, np.cumsum(sizes) - sizes


class TrainingDataLoader:
    """An endless iterator over this process's micro-batches, starting at `first_step`.

    Yields inputs_BT and targets_BT, int64 on `device`.
    """

    def __init__(
        self,
        dataset: WindowDataset,
        *,
        seed: int,
        batch_size: int,
        micro_batch_size: int,
        rank: int,
        world_size: int,
        device: torch.device,
        first_step: int,
    ) -> None:
        assert batch_size % (micro_batch_size * world_size) == 0, "Config.grad_accumulation_steps has checked this"
        self.dataset = dataset
        self.order = SampleOrder(dataset.windows_per_shard, max(1, GROUP_TOKENS // dataset.n_ctx), seed)
        most_windows = max(windows for _, _, windows in self.order.groups)
        self._group, self._tokens = (-1, 0, 0), np.empty(most_windows * dataset.n_ctx + 1, TOKEN_DTYPE)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.device = rank, device
        self._micro_batches_a_step = batch_size // world_size // micro_batch_size
        self._next = first_step * self._micro_batches_a_step

    def step_windows(self, step: int) -> list[tuple[int, int]]:
        """Shard of the dataset, and window in it, of each sequence of `step` (counted from 0) over all processes.

        Process r trains on the r-th of world_size equal parts of the list, micro-batch after micro-batch.
        """
        places = [self.order[number] for number in range(step * self.batch_size, (step + 1) * self.batch_size)]
        return [(shard, first + window) for (shard, first, _), window in places]

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        step, part = divmod(self._next, self._micro_batches_a_step)  # of this process, counted from step 0 of the run
        part += self.rank * self._micro_batches_a_step
        first = step * self.batch_size + part * self.micro_batch_size
        # Pinned memory lets the copy to the GPU run in the background. Without it, each copy blocks.
        pinned = self.device.type == "cuda"
        n_ctx = self.dataset.n_ctx
        batch = torch.empty(self.micro_batch_size, n_ctx + 1, dtype=torch.int64, pin_memory=pinned)
        for number, row in enumerate(batch.numpy(), start=first):
            group, window = self.order[number]
            if group != self._group:
                self._group = (-1, 0, 0)  # a read that fails halfway leaves no group
                shard, first_window, windows = group
                self.dataset.read(shard, first_window, self._tokens[: windows * n_ctx + 1])
                self._group = group
            row[:] = self._tokens[window * n_ctx : (window + 1) * n_ctx + 1]
        self._next += 1
        batch = batch.to(self.device, non_blocking=pinned)
        return batch[:, :-1], batch[:, 1:]
