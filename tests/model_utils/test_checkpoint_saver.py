"""Saving while training continues; and what checkpoints take of a disk, compared with a run played through."""

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from src.model_configs.my_llm_config import debug, lf_llm_269m
from src.model_utils import checkpoint_saver, checkpoint_utils
from src.model_utils.checkpoint_saver import (
    AfterSave,
    CheckpointSaver,
    Saved,
    checkpoint_bytes,
    checkpoints_need,
    refuse_full_disk,
)
from src.params import CheckpointConfig, Config
from src.utils.errors import NonFiniteError, StorageError
from src.utils.files import bytes_below
from tests.conftest import Commands
from tests.drills.small_run import SETTINGS


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
        while not (run / "log").exists():
            time.sleep(0.01)
    go_ahead.touch()
    after.close(60)
    assert (run / "log").read_text() == "run 1 checkpoints/step_0000001\nrun 3 checkpoints/step_0000003\n"
    assert warnings[-1].startswith("warning: the command after the save failed with exit code 1: echo $RUN_NAME")


def test_a_command_that_hangs_does_not_hold_a_run_for_ever(tmp_path: Path):
    warnings = list[str]()
    after = AfterSave("exec sleep 3", tmp_path, warnings.append)
    after.add([Saved(tmp_path, 1, 0, 0.0, 0.0)])
    after.poll()
    after.close(0.1)
    assert warnings[-1] == "warning: the command after the save still runs; it is left running"


SIZE = checkpoint_bytes(debug())


def config(total_steps: int, every: int, last: int, multiples: int, resume: str = "auto") -> Config:
    preset = debug()
    return replace(
        preset,
        resume=resume,
        train=replace(preset.train, total_steps=total_steps),
        checkpoint=CheckpointConfig(every, last, multiples),
    )


def put(root: Path, name: str, size: int = SIZE) -> None:
    """A checkpoint's folder by name and size; its file has no blocks on the disk."""
    (root / name).mkdir(parents=True)
    (root / name / "model.safetensors").touch()
    os.truncate(root / name / "model.safetensors", size)


@pytest.mark.parametrize(("width", "layers"), [("128", "2"), ("256", "3")])
def test_one_is_as_large_as_a_saved_one(commands: Commands, dataset: Callable[..., Path], width: str, layers: str):
    data = dataset(train_tokens=[700, 900], n_vocab=300)
    shape = ("--model.n-embd", width, "--model.n-layer", layers)
    arguments = ("--run-name", "real", "--data.dir", str(data), *SETTINGS, *shape, "--train.total-steps", "1")
    assert commands.pretrain("debug", *arguments).returncode == 0
    run = commands.temp_data / "runs" / "real"
    saved = bytes_below(run / "checkpoints" / "step_0000001")
    preset = debug()
    model = replace(preset.model, n_vocab=300, n_ctx=16, n_embd=int(width), n_head=2, n_layer=int(layers))
    assert checkpoint_bytes(replace(preset, model=model)) == pytest.approx(saved, rel=0.01)


def most_more(held: dict[int, int], size: int, config: Config) -> int:
    """The most bytes beyond those of `held` that a run takes, played through save by save."""
    before, most, disk = sum(held.values()), 0, dict(held)
    for step in range(max(held, default=0) + 1, config.total_steps + 1):
        if step % config.checkpoint.every_steps and step != config.total_steps:
            continue
        disk[step] = size
        most = max(most, sum(disk.values()) - before)
        newest = sorted(disk)[-config.checkpoint.keep_last :]
        multiple = config.checkpoint.keep_every_steps
        disk = {s: b for s, b in disk.items() if s in newest or (multiple and s % multiple == 0)}
    return most


@pytest.mark.parametrize("held", [[], [10], [10, 20], [10, 20, 30, 40, 50], [20, 40, 55], [100]])
def test_a_run_never_holds_more(tmp_path: Path, held: list[int]):
    for step in held:
        put(tmp_path, f"step_{step:07d}")
    for total, every, last, multiples in itertools.product([45, 100, 104], [5, 10, 200], [2, 4], [0, 20]):
        settings = config(total, every, last, multiples)
        expected = most_more(dict.fromkeys(held, SIZE), SIZE, settings)
        assert checkpoints_need(settings, tmp_path) == expected, settings.checkpoint


def test_the_recipe_holds_seven_at_once():
    """At 3815, 7630, 11445 and 15260 for good, the two before the last, and the last."""
    recipe = lf_llm_269m()
    assert checkpoints_need(recipe, Path("/nowhere")) == 7 * checkpoint_bytes(recipe)
    assert checkpoint_bytes(recipe) == pytest.approx(320_000_000 * 12, rel=0.01)


def test_what_is_set_aside_stays_and_what_is_left_over_goes(tmp_path: Path):
    for name in ("step_0000010", "step_0000020", "step_0000030", "step_0000020.set-aside-1"):
        put(tmp_path, name)
    assert checkpoints_need(config(100, 10, 2, 0), tmp_path) == SIZE  # the first save, before it removes two
    assert checkpoints_need(config(100, 10, 2, 0, resume="20"), tmp_path) == SIZE
    assert checkpoints_need(config(100, 10, 2, 0, resume="10"), tmp_path) == 2 * SIZE
    assert checkpoints_need(config(100, 10, 2, 0, resume="never"), tmp_path) == 3 * SIZE
    put(tmp_path, "step_0000040.tmp-123", 1000)
    put(tmp_path, "step_0000005.removed-123", 500)
    assert checkpoints_need(config(100, 10, 2, 0), tmp_path) == SIZE - 1500


def test_a_full_disk_is_refused_with_its_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    settings = config(100, 10, 2, 0)
    monkeypatch.setattr(checkpoint_saver, "free_bytes", lambda _: 3 * SIZE)
    refuse_full_disk(settings, tmp_path)
    monkeypatch.setattr(checkpoint_saver, "free_bytes", lambda _: 3 * SIZE - 1)
    with pytest.raises(StorageError) as caught:
        refuse_full_disk(settings, tmp_path)
    assert f"Cannot hold the run's checkpoints on the disk of {tmp_path}" in str(caught.value)
    assert f"they need {3 * SIZE:,} bytes more, {3 * SIZE - 1:,} are free" in str(caught.value)
    assert "TEMP_DATA_DIR" in str(caught.value)
