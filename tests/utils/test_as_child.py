"""as_child.sh: a command's own exit code, whatever signals come meanwhile."""

import subprocess
import sys

import pytest

from src.utils.root import ROOT

# The command asks its shell to stop, is deaf to being asked itself, and ends after the command $2; all that $1 times.
SCRIPT = """
set -euo pipefail
. "$0"
for _ in $(seq "$1"); do
    code=0
    as_child sh -c "trap '' TERM; kill -TERM \\$PPID; $2; exit 4" || code=$?
    echo "$code"
done
"""


def codes_of(times: int, meanwhile: str) -> list[str]:
    command = ["bash", "-c", SCRIPT, str(ROOT / "src" / "utils" / "as_child.sh"), str(times), meanwhile]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert result.stderr == ""
    return result.stdout.split()


def test_a_signal_together_with_the_end_answers_with_the_commands_code_or_that_of_a_stop():
    """Where bash itself loses the code (in 6% of such cases on an idle machine, 40% on a busy one), it is taken for a
    stop. The code that is sure to come is tested below."""
    codes = codes_of(200, "true")
    assert len(codes) == 200
    assert set(codes) <= {"4", "143"}
    assert "4" in codes


def test_a_command_that_ends_after_the_signal_answers_with_its_own_code():
    assert codes_of(5, "sleep 0.4") == ["4"] * 5


# The command, a Python program that hears all four, asks its shell and says which one comes back.
HEARD = """
. "$0"
as_child "$1" -c '
import os, signal, sys, time
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP):
    signal.signal(number, lambda came, _: (print(signal.Signals(came).name), sys.exit(143)))
os.kill(os.getppid(), signal.Signals[sys.argv[1]])
time.sleep(30)
' "$2"
"""


@pytest.mark.parametrize(
    ("sent", "heard"), [("SIGTERM", "SIGTERM"), ("SIGINT", "SIGTERM"), ("SIGUSR1", "SIGUSR1"), ("SIGHUP", "SIGHUP")]
)
def test_a_signal_comes_through_as_it_is_but_for_ctrl_c(sent: str, heard: str):
    command = ["bash", "-c", HEARD, str(ROOT / "src" / "utils" / "as_child.sh"), sys.executable, sent]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stdout, result.stderr) == (143, f"{heard}\n", "")
