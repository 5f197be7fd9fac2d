"""Drill 21: the clock is set back a day, between two starts and again in the middle of the second.

What Python's time.time says, and the times of the files; log.txt has the machine's own.
"""

import itertools
import json
import os
import re
from collections.abc import Callable
from pathlib import Path

from tests.conftest import Commands
from tests.drills.small_run import AT_LINE, LONGER, assert_same_run, module, start, start_with

DAY_S = 86_400.0

STOP_AFTER_9 = AT_LINE + "import os, signal\nat_line('train', 9, lambda: os.kill(os.getpid(), signal.SIGTERM))\n"
A_DAY_EARLIER = (
    AT_LINE
    + """
import time

now, days_back = time.time, 1

def set_back():
    global days_back
    days_back += 1

time.time = lambda: now() - days_back * 86_400
at_line("train", 11, set_back)
"""
)


def test_the_same_checkpoint_is_chosen_and_no_time_is_negative(commands: Commands, dataset: Callable[..., Path]):
    data, runs = dataset(train_tokens=[700, 900], n_vocab=300), commands.temp_data / "runs"
    assert start(commands, data, *LONGER, "--run-name", "whole").returncode == 0
    assert start_with(commands, STOP_AFTER_9, data, *LONGER).returncode == 143
    for age, checkpoint in enumerate(sorted((runs / "drill" / "checkpoints").iterdir())):
        for path in (checkpoint, *checkpoint.iterdir()):  # the older a checkpoint is, the newer it looks
            os.utime(path, times=(path.stat().st_mtime - age * DAY_S,) * 2)

    result = start_with(commands, A_DAY_EARLIER, data, *LONGER)
    assert result.returncode == 0, result.stderr
    assert "from step_0000009 of 12 steps" in result.stderr
    assert_same_run(runs / "drill", runs / "whole", steps=12)
    times = [json.loads(line)["time"] for line in (runs / "drill" / "metrics.jsonl").read_text().splitlines()]
    assert sum(later < earlier - DAY_S / 2 for earlier, later in itertools.pairwise(times)) == 2
    for kind, keys in (("train", ("step_ms", "tokens_per_second")), ("checkpoint", ("seconds",))):
        assert all(line[key] > 0 for line in commands.metrics("drill", kind) for key in keys)
    assert re.findall(r"-\d+ day|-[\d.]+ s\b", result.stderr) == []

    assert module(commands, "src.model_assessment.report", "drill").returncode == 0
    page = (runs / "drill" / "report.html").read_text()
    assert re.search(r'<dt>Time</dt><dd class="value">\d+ (s|min)', page)
    first, last = re.findall(r'<span class="number">(\d{4}-[\d: -]+ UTC)</span>', page)
    assert first < last
