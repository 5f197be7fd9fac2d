"""Drill 31: a checkpoint folder under the name of another step; a manifest that leaves out a file."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import contents, rewrite, start


def leave_out(name: str) -> Callable[[Path], None]:
    def change(step_4: Path) -> None:
        manifest = step_4 / "manifest.json"
        content = json.loads(manifest.read_text())
        del content["files"][name]
        manifest.write_text(json.dumps(content))

    return change


def another_step_inside(step_4: Path) -> None:
    state = json.loads((step_4 / "state.json").read_text())
    rewrite(step_4 / "state.json", json.dumps(state | {"step": 3}))


def test_a_copy_under_a_later_name_moves_nothing_good(commands: Commands, dataset: Callable[..., Path]) -> None:
    data, root = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs" / "drill" / "checkpoints"
    assert start(commands, data).returncode == 0
    good, log = contents(root), (root.parent / "metrics.jsonl").read_bytes()
    shutil.copytree(root / "step_0000002", root / "step_0000900")
    (root / "step_0000901").mkdir()
    (root / "step_0000902").write_text("not a folder")
    result = start(commands, data)
    assert result.returncode == 0, result.stderr
    assert f"skipped a damaged checkpoint: {root / 'step_0000900'}: it holds step 2, but its name" in result.stderr
    assert {path: content for path, content in contents(root).items() if path in good} == good
    assert (root.parent / "metrics.jsonl").read_bytes().startswith(log)


def test_a_manifest_that_leaves_out_a_file_is_damage(commands: Commands, dataset: Callable[..., Path]) -> None:
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    assert start(commands, data).returncode == 0
    names = ("optimizer.safetensors", "rank_00000.safetensors", "state.json", "model.safetensors")
    changes = {f"manifest.json does not list {name}": leave_out(name) for name in names}
    changes["step = 3 cannot be that of step_0000004"] = another_step_inside
    for number, (expected, change) in enumerate(changes.items()):
        run = runs / f"case_{number}"
        shutil.copytree(runs / "drill", run)
        change(run / "checkpoints" / "step_0000004")
        result = start(commands, data, "--run-name", run.name)
        assert result.returncode == 0, result.stderr
        assert expected in result.stderr
        assert "resume: from step_0000002 of 4 steps" in result.stderr
        ends = [folder / "checkpoints" / "step_0000004" / "model.safetensors" for folder in (runs / "drill", run)]
        assert ends[0].read_bytes() == ends[1].read_bytes()
