"""Drill 13: a request to stop, to one process only, in the midst of a step, an evaluation, samples, a save."""

import json
from pathlib import Path

import pytest

from tests.conftest import Commands, write_dataset
from tests.drills.pair import fork_pair
from tests.drills.small_run import LONGER, assert_same_run

SIGNAL = """
import signal
def ask(*_):
    moment()
    os.kill(os.getpid(), signal.{name})
"""
# A second request while the first is obeyed: at each file of the save that follows, not of one still under way.
AGAIN = """
from src.model_utils import checkpoint_utils
save_file = checkpoint_utils.save_file
def asked_while_saving(tensors, path):
    if "step_{step:07d}" in str(path):
        os.kill(os.getpid(), signal.SIGTERM)
    save_file(tensors, path)
checkpoint_utils.save_file = asked_while_saving
"""
IN_A_STEP = "at_step(6, {rank}, ask)\n"
# In the midst of the validation at step 6, after its first batch.
IN_AN_EVALUATION = """
from src.model_assessment import validation
from src.model import LLM
hidden, batches = LLM.hidden, []
def counted(self, *inputs):
    if not self.training:
        batches.append(1)
        if len(batches) == {batch} and os.environ["RANK"] == "{rank}":
            ask()
    return hidden(self, *inputs)
LLM.hidden = counted
"""
# The first process makes 200 tokens, which take half a minute; after the fifth one the other is asked to stop.
WHILE_THE_OTHER_SAMPLES = """
import signal
from src.model_assessment import sampling
choose, tokens = sampling._choose, []
def slowly(*arguments):
    time.sleep(0.15)
    tokens.append(1)
    if len(tokens) == 5:
        moment()
        with open(os.path.join(folder, "pid_1")) as file:
            os.kill(int(file.read()), signal.SIGTERM)
    return choose(*arguments)
sampling._choose = slowly
"""
SAMPLES = (
    *("--model.n-vocab", "50257", "--eval.sample-every-steps", "100"),
    *("--eval.sample-prompts", "", "--eval.samples-per-prompt", "1", "--eval.sample-tokens", "200"),
)
# Each process validates 5 windows in 3 batches, at steps 0, 3 and 6.
EVALUATED = IN_AN_EVALUATION.replace("{batch}", "7")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The dataset, and the run directory of a run that was never asked to stop."""
    folder = tmp_path_factory.mktemp("whole")
    data = write_dataset(folder / "data", [700, 900], 2_000, 300)
    assert fork_pair(Commands(folder), folder, "", data, *LONGER).code == 0
    return data, folder / "runs" / "drill"


@pytest.mark.parametrize(
    ("where", "rank", "name"),
    [(IN_A_STEP, 0, "SIGTERM"), (IN_A_STEP, 1, "SIGUSR1"), (EVALUATED, 0, "SIGINT"), (EVALUATED, 1, "SIGTERM")],
    ids=["step-0", "step-1", "evaluation-0", "evaluation-1"],
)
def test_all_stop_together_and_resume_to_the_same_bits(
    commands: Commands, tmp_path: Path, whole: tuple[Path, Path], where: str, rank: int, name: str
) -> None:
    data, reference = whole
    step = 6 if where == EVALUATED else 7
    lines = SIGNAL.format(name=name) + AGAIN.format(step=step) + where.format(rank=rank)
    stopped = fork_pair(commands, tmp_path, lines, data, *LONGER)
    assert stopped.code == 143, stopped.stderr
    assert stopped.seconds < 10
    assert stopped.gone
    assert "Traceback" not in stopped.stderr
    run_dir = commands.temp_data / "runs" / "drill"
    status = json.loads((run_dir / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("stopped", 143)
    assert status["step"] == step
    (event,) = [record for record in commands.metrics("drill", "event") if record["name"] == "stop"]
    assert name in event["detail"]
    validated = [record["step"] for record in commands.metrics("drill", "validation")]
    assert validated == ([0, 3] if where == EVALUATED else [0, 3, 6])
    assert fork_pair(commands, tmp_path, "", data, *LONGER).code == 0
    assert_same_run(reference, run_dir, steps=12)


def test_samples_that_the_other_process_makes_are_given_up(
    commands: Commands, tmp_path: Path, whole: tuple[Path, Path]
) -> None:
    stopped = fork_pair(commands, tmp_path, WHILE_THE_OTHER_SAMPLES, whole[0], *LONGER, *SAMPLES)
    assert stopped.code == 143, stopped.stderr
    assert stopped.seconds < 10
    assert stopped.gone
    assert "stopped on request after step 0 (SIGTERM)" in stopped.stderr
    assert commands.metrics("drill", "sample") == []
    assert fork_pair(commands, tmp_path, "", whole[0], *LONGER, *SAMPLES).code == 0
    assert [record["step"] for record in commands.metrics("drill", "sample")] == [0, 12]
