"""Token shards -> batches.

The training tokens are cut into windows of n_ctx + 1 tokens that overlap by one, so that a token is predicted
once an epoch, but for a shard's first and the rest at its end that fills no window. Consecutive windows of a
shard, GROUP_TOKENS // n_ctx of them (fewer at its end), form a group, which is read from the disk in one piece:
so reads are long and forward, and of a dataset of any size a process holds one group.

The order of the windows is a pure function of the seed. Number the groups shard by shard, as the manifest lists
them, and let permutation(n, seed, ...) be that of src/utils/rand_idx_seq_gen.py: epoch e visits the groups in
the order permutation(groups, seed, e, 0), and the windows of group g in the order permutation(windows of g,
seed, e, 1 + g). Sequence number s * batch_size + j of that order, counted over all epochs, is sequence j of
step s, for any number of processes; a process takes its share of each step. All the loader's state is therefore
a step number, and going on from one costs two permutations, whatever the step.

Windows are shuffled within 8M tokens, not over all of them: documents already lie in random order in a dataset.
One of no more tokens is a single group. Shapes: B sequences, T positions.
"""

import queue
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from src.data_processing.shards import TOKEN_DTYPE, Shard, check_shard
from src.utils.errors import StorageError, UserError
from src.utils.rand_idx_seq_gen import permutation

# 16 MiB: long enough that a disk's seek or a network's round trip costs next to nothing. Changes the order.
GROUP_TOKENS = 1 << 23


class WindowDataset:
    """The windows of some shards of a dataset, read when asked for; no file stays open.

    Raises UserError for a dataset that is damaged or too small, and StorageError where a later read fails.
    """

    def __init__(self, folder: Path, shards: tuple[Shard, ...], n_ctx: int, n_vocab: int, at_least: int) -> None:
        """`at_least`: the windows its user needs; `n_vocab`: the ids a model can take."""
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
            have = sum(shard.tokens for shard in shards)
            split = shards[0].split if shards else "training"
            raise UserError(
                f"the {split} part of {folder} holds {have} tokens: {self.n_windows} windows of n_ctx + 1 = "
                f"{n_ctx + 1}. At least {at_least} are needed, or {at_least * n_ctx + 1} tokens. "
                "Add text, or make the batch or model.n_ctx smaller"
            )

    def __getitem__(self, number: int) -> np.ndarray:
        """Window `number` in reading order over all shards: n_ctx + 1 token ids, uint16."""
        shard = int(np.searchsorted(self._ends, number, side="right"))
        tokens = np.empty(self.n_ctx + 1, TOKEN_DTYPE)
        self.read(shard, number - int(self._ends[shard] - self.windows_per_shard[shard]), tokens)
        return tokens

    def read(self, shard: int, first: int, tokens: np.ndarray) -> None:
        """Fills `tokens`, uint16, with the token ids of shard `shard` from the start of its window `first` on."""
        path, offset = self.paths[shard], self._header_bytes[shard] + first * self.n_ctx * TOKEN_DTYPE.itemsize
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                found = file.readinto(tokens.data)
        except OSError as error:
            raise StorageError(f"cannot read {path}: {error.strerror or error}; put it back and start again") from error
        if found < tokens.nbytes:
            what = f"expected {tokens.nbytes} bytes from byte {offset} on, found {found}"
            raise StorageError(f"{path} became shorter while it was in use: {what}; prepare the dataset again")


class SampleOrder:
    """Which window each sequence number of a training run is."""

    def __init__(self, windows_per_shard: np.ndarray, windows_per_group: int, seed: int) -> None:
        self.epoch_length = int(windows_per_shard.sum())
        self.seed = seed
        self.groups = [
            (shard, first, min(windows_per_group, windows - first))
            for shard, windows in enumerate(windows_per_shard.tolist())
            for first in range(0, windows, windows_per_group)
        ]
        """Shard, first window and number of windows of each group."""

        # An epoch walks through one group after the other, so only the current ones' orders are kept.
        self._group_order = lru_cache(maxsize=2)(self._make_group_order)
        self._window_order = lru_cache(maxsize=2)(self._make_window_order)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Group of sequence `number`, counted from the start of the run over all epochs, and its window there."""
        epoch, position = divmod(number, self.epoch_length)
        groups, starts = self._group_order(epoch)
        turn = int(np.searchsorted(starts, position, side="right")) - 1
        group = int(groups[turn])
        return group, int(self._window_order(epoch, group)[position - starts[turn]])

    def _make_group_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of groups, and the position at which each one's turn starts."""
        groups = permutation(len(self.groups), self.seed, epoch, 0)
        sizes = np.array([windows for _, _, windows in self.groups])[groups]
        return groups, np.cumsum(sizes) - sizes

    def _make_window_order(self, epoch: int, group: int) -> np.ndarray:
        return permutation(self.groups[group][2], self.seed, epoch, 1 + group)


class TrainingDataLoader:
    """An iterator over this process's micro-batches, from `first_step` on and without end.

    Yields inputs_BT and targets_BT, int64 on `device`, prepared ahead by a thread that ends with the `with` block.
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
        self._group, self._tokens = -1, np.empty(most_windows * dataset.n_ctx + 1, TOKEN_DTYPE)
        self.batch_size, self.micro_batch_size = batch_size, micro_batch_size
        self.rank, self.world_size, self.device = rank, world_size, device
        self._ready: queue.Queue[torch.Tensor | BaseException] = queue.Queue(maxsize=4)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(first_step,), name="prefetch", daemon=True)
        self._thread.start()

    def sequence_numbers(self, step: int) -> range:
        """The sequence numbers that this process trains on in `step`."""
        share = self.batch_size // self.world_size
        first = step * self.batch_size + self.rank * share
        return range(first, first + share)

    def step_windows(self, step: int) -> list[tuple[int, int]]:
        """The windows of `step`, counted from 0, of all processes, in the order of their sequence numbers.

        Each is a shard and its window there, which starts at token window * n_ctx. Shard i is the i-th that `dataset`
        was given: of manifest.train, it is manifest.shards[len(manifest.validation) + i]. Process r trains on the r-th
        of world_size equal parts of the list, micro-batch after micro-batch.
        """
        places = []
        for number in range(step * self.batch_size, (step + 1) * self.batch_size):
            group, window = self.order[number]
            shard, first, _ = self.order.groups[group]
            places.append((shard, first + window))
        return places

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        windows = self._ready.get()
        if isinstance(windows, BaseException):
            raise windows
        windows = windows.to(self.device, non_blocking=self.device.type == "cuda")
        return windows[:, :-1], windows[:, 1:]

    def __enter__(self) -> "TrainingDataLoader":
        return self

    def __exit__(self, *_: object) -> None:
        """Ends the thread; the loader yields nothing after that."""
        self._closed.set()
        self._thread.join()

    def _fill(self, step: int) -> None:
        try:
            while not self._closed.is_set():
                numbers = self.sequence_numbers(step)
                for first in range(0, len(numbers), self.micro_batch_size):
                    self._put(self._micro_batch(numbers[first : first + self.micro_batch_size]))
                step += 1
        except BaseException as error:
            self._put(error)

    def _micro_batch(self, numbers: range) -> torch.Tensor:
        # from pinned memory the copy to the GPU waits its turn there, and the program goes on
        pinned = self.device.type == "cuda"
        n_ctx = self.dataset.n_ctx
        batch = torch.empty(len(numbers), n_ctx + 1, dtype=torch.int64, pin_memory=pinned)
        for row, number in zip(batch.numpy(), numbers, strict=True):
            group, window = self.order[number]
            if group != self._group:
                shard, first, windows = self.order.groups[group]
                self.dataset.read(shard, first, self._tokens[: windows * n_ctx + 1])
                self._group = group
            row[:] = self._tokens[window * n_ctx : (window + 1) * n_ctx + 1]
        return batch

    def _put(self, item: torch.Tensor | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue
