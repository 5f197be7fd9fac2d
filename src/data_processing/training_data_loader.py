"""Token shards -> batches.

The training tokens are cut into windows of n_ctx + 1 tokens that overlap by one, so that a token is predicted
once an epoch, but for a shard's first and the rest at its end that fills no window. The order of the windows
is a pure function of the seed: epoch by epoch, shards in random order, windows of a shard in random order.
Sequence number s * batch_size + j of that order is sequence j of step s, for any number of processes; a
process takes its share of each step. All the loader's state is therefore a step number.
Shapes: B sequences, T positions.
"""

import queue
import threading
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch

from src.data_processing.shards import Manifest, Shard, check_shard, unlisted_files
from src.utils.errors import UserError
from src.utils.rand_idx_seq_gen import permutation


class WindowDataset:
    """The windows of some shards of a dataset, memory-mapped. Raises UserError for a damaged or too small one."""

    def __init__(self, folder: Path, shards: tuple[Shard, ...], n_ctx: int, n_vocab: int, at_least: int) -> None:
        """`at_least`: the windows its user needs; `n_vocab`: the ids a model can take."""
        for shard in shards:
            check_shard(folder, shard, n_vocab)
        self.n_ctx = n_ctx
        self.windows_per_shard = np.array([max(0, shard.tokens - 1) // n_ctx for shard in shards])
        self.n_windows = int(self.windows_per_shard.sum())
        if self.n_windows < at_least:
            have = sum(shard.tokens for shard in shards)
            split = shards[0].split if shards else "training"
            raise UserError(
                f"the {split} part of {folder} holds {have} tokens: {self.n_windows} windows of n_ctx + 1 = "
                f"{n_ctx + 1}. One batch takes {at_least} windows, about {at_least * n_ctx} tokens. "
                "Add text, or make the batch or model.n_ctx smaller"
            )
        self._shards = [np.load(folder / shard.file, mmap_mode="r") for shard in shards]

    def __getitem__(self, number: int) -> np.ndarray:
        """Window `number` in reading order over all shards: n_ctx + 1 token ids, uint16."""
        ends = np.cumsum(self.windows_per_shard)
        shard = int(np.searchsorted(ends, number, side="right"))
        return self.window(shard, number - int(ends[shard] - self.windows_per_shard[shard]))

    def window(self, shard: int, index: int) -> np.ndarray:
        """Window `index` of shard `shard`: n_ctx + 1 token ids, uint16."""
        start = index * self.n_ctx
        return self._shards[shard][start : start + self.n_ctx + 1]


class SampleOrder:
    """Which window each sequence number of a training run is."""

    def __init__(self, windows_per_shard: np.ndarray, seed: int) -> None:
        self.windows_per_shard = windows_per_shard
        self.epoch_length = int(windows_per_shard.sum())
        self.seed = seed

        # An epoch walks through one shard after the other, so only the current ones' orders are kept.
        self._shard_order = lru_cache(maxsize=2)(self._make_shard_order)
        self._window_order = lru_cache(maxsize=2)(self._make_window_order)

    def __getitem__(self, number: int) -> tuple[int, int]:
        """Shard and window of sequence `number`, counted from the start of the run over all epochs."""
        epoch, position = divmod(number, self.epoch_length)
        shards, ends = self._shard_order(epoch)
        turn = int(np.searchsorted(ends, position, side="right"))
        shard = int(shards[turn])
        first = int(ends[turn]) - int(self.windows_per_shard[shard])
        return shard, int(self._window_order(epoch, shard)[position - first])

    def _make_shard_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """The epoch's order of shards, and the position at which each one's turn ends."""
        shards = permutation(len(self.windows_per_shard), self.seed, epoch, 0)
        return shards, np.cumsum(self.windows_per_shard[shards])

    def _make_window_order(self, epoch: int, shard: int) -> np.ndarray:
        return permutation(int(self.windows_per_shard[shard]), self.seed, epoch, 1 + shard)


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
        self.order = SampleOrder(dataset.windows_per_shard, seed)
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

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        return self

    def __next__(self) -> tuple[torch.Tensor, torch.Tensor]:
        windows = self._ready.get()
        if isinstance(windows, BaseException):
            raise windows
        windows = windows.to(self.device, non_blocking=True)
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
        windows = np.stack([self.dataset.window(*self.order[number]) for number in numbers])
        batch = torch.from_numpy(windows.astype(np.int64))
        # from pinned memory the copy to the GPU runs while the GPU computes
        return batch.pin_memory() if self.device.type == "cuda" else batch

    def _put(self, item: torch.Tensor | BaseException) -> None:
        while not self._closed.is_set():
            try:
                self._ready.put(item, timeout=0.1)
                return
            except queue.Full:
                continue


def stray_files(folder: Path, manifest: Manifest) -> str | None:
    """One line about files in the dataset's folder that are not part of it, or None."""
    strays = unlisted_files(folder, manifest)
    if not strays:
        return None
    return f"ignoring {len(strays)} file(s) in {folder} that its manifest does not list: {', '.join(strays[:3])}"
