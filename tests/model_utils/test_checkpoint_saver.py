"""Saving during training."""

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from src.model_utils import checkpoint_utils
from src.model_utils.checkpoint_saver import AfterSave, CheckpointSaver, Saved
from src.params import CheckpointConfig
from src.utils.errors import NonFiniteError, StorageError


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., CheckpointSaver]]:
    """Makes savers that keep their last two checkpoints, and closes them."""
    savers: list[CheckpointSaver] = []

    def saver(before: Callable[[], None] = lambda: None) -> CheckpointSaver:
        savers.append(CheckpointSaver(tmp_path / "checkpoints", CheckpointConfig(keep_last=2), before))
        return savers[-1]

    yield saver
    for each in savers:
        each.close()


def parts(value: float) -> dict[str, dict[str, torch.Tensor]]:
    return {"model": {"w": torch.full((3,), value)}}


def test_what_is_saved_is_what_was_there_at_the_start(make: Callable[..., CheckpointSaver]):
    """Training continues at once, and changes the very tensors that are being saved."""
    may_write = threading.Event()
    saver = make(lambda: may_write.wait(10) or None)
    tensors = parts(1.0)
    saver.start(1, tensors, {})
    tensors["model"]["w"].fill_(2.0)
    assert saver.finished() == []
    assert not saver.root.exists()
    may_write.set()
    (saved,) = saver.wait()
    assert (saved.step, saved.path) == (1, checkpoint_utils.step_dir(saver.root, 1))
    assert 0 <= saved.held_up_seconds <= saved.seconds
    assert checkpoint_utils.open_checkpoint(saved.path).tensors("model")["w"].tolist() == [1.0] * 3
    assert saver.finished() == saver.wait() == []


def test_one_save_at_a_time_and_old_ones_are_pruned(make: Callable[..., CheckpointSaver]):
    saver = make()
    saved = []
    for step in (1, 2, 3):
        saved += saver.start(step, parts(step), {})
    assert [one.step for one in saved] == [1, 2]
    assert [one.step for one in saver.wait()] == [3]
    assert checkpoint_utils.checkpoint_steps(saver.root) == [2, 3]


def test_a_saved_step_stays_unchanged(make: Callable[..., CheckpointSaver]):
    saver = make()
    saver.start(1, parts(1.0), {})
    saver.start(1, parts(2.0), {})
    assert saver.wait() == []
    path = checkpoint_utils.step_dir(saver.root, 1)
    assert checkpoint_utils.open_checkpoint(path).tensors("model")["w"].tolist() == [1.0] * 3


def test_a_failure_is_known_and_raised_by_the_next_start(make: Callable[..., CheckpointSaver]):
    saver = make()
    saver.root.parent.mkdir(exist_ok=True)
    saver.root.write_text("a file where the folder should be")
    saver.start(1, parts(1.0), {})
    while not saver.failed:
        pass
    assert saver.finished() == []
    with pytest.raises(StorageError, match="Cannot save the checkpoint of step 1"):
        saver.start(2, parts(2.0), {})


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_numbers_that_are_not_finite_are_not_kept(make: Callable[..., CheckpointSaver], bad: float):
    saver = make()
    saver.start(1, parts(1.0), {})
    saver.start(2, parts(bad), {})
    with pytest.raises(NonFiniteError, match=r"Cannot save the checkpoint of step 2: .*model: w"):
        saver.wait()
    assert checkpoint_utils.checkpoint_steps(saver.root) == [1]


def test_a_command_runs_after_each_save_for_the_newest_checkpoint(tmp_path: Path):
    """The first still runs while two more saves end."""
    run, go_ahead, warnings = tmp_path / "run", tmp_path / "go", list[str]()
    run.mkdir()
    command = f"echo $RUN_NAME $STEP $CHECKPOINT >>log; until [ -e '{go_ahead}' ]; do sleep 0.02; done; [ $STEP != 3 ]"
    after = AfterSave(command, run, warnings.append)
    for step in (1, 2, 3):
        after.add([Saved(checkpoint_utils.step_dir(run / "checkpoints", step), step, 0, 0.0, 0.0)])
        after.poll()
    go_ahead.touch()
    after.close(60)
    assert (run / "log").read_text() == "run 1 checkpoints/step_0000001\nrun 3 checkpoints/step_0000003\n"
    assert warnings[-1].startswith("warning: the command after the save failed with exit code 1: echo $RUN_NAME")


def test_a_command_that_hangs_does_not_hold_a_run_for_ever(tmp_path: Path):
    warnings = list[str]()
    after = AfterSave("exec sleep 20", tmp_path, warnings.append)
    after.add([Saved(tmp_path, 1, 0, 0.0, 0.0)])
    after.poll()
    after.close(0.1)
    assert warnings[-1] == "warning: the command after the save still runs; it is left alone"
    assert after._running
    after._running.kill()
    after._running.wait()
