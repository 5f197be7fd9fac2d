"""Loss spikes: the decision to skip a step before the optimizer touches anything.

A step is a spike if its loss is more than z standard deviations above the level of the recent losses. Level and
deviation are medians, so that spikes among them hardly count. The level is the median of the last LEVEL_LOSSES, few
enough to follow a falling curve. The deviation comes from the changes between successive losses: the spread of the
losses themselves would mistake a steep curve for noise.

After MAX_IN_A_ROW spikes the next loss is accepted, however high: the level has shifted, and only training can bring it
down. Level and deviation follow, so the guard never skips every step to the end of a run.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

MAX_IN_A_ROW = 9
LEVEL_LOSSES = 2 * MAX_IN_A_ROW + 1  # so that a whole burst is less than half of them
CHANGES = 128  # gives the deviation to about 10%

# In nats. The losses of steps of 524,288 tokens scatter by 0.02. Below half of that, for example if a loss hardly
# moves, rounding and the order of sums would look like spikes, and skipping them would gain nothing.
SMALLEST_DEVIATION = 0.01

# The standard deviation of a normal distribution is 1.4826 median absolute deviations; a change has two losses' noise.
_CHANGE_TO_DEVIATION = 1.4826 / math.sqrt(2)


@dataclass
class SpikeGuard:
    """Decides about each step from the losses alone, so that all processes decide alike."""

    z: float
    """Standard deviations above the level at which a loss becomes a spike; 0 turns the guard off."""
    losses: list[float] = field(default_factory=list)
    """The whole state: the recent losses, spikes included, the newest last."""

    def is_spike(self, loss: float) -> bool:
        """True if the step with this mean loss, in nats, should be skipped; False for a non-finite loss."""
        if not math.isfinite(loss) or not self._is_high(loss, self.losses):
            return False
        newest = range(len(self.losses) - MAX_IN_A_ROW, len(self.losses))
        return not all(self._is_high(self.losses[i], self.losses[:i]) for i in newest)

    def add(self, loss: float) -> None:
        """Remembers the loss of a step, skipped or not. Ignores a non-finite loss."""
        if self.z and math.isfinite(loss):
            self.losses.append(loss)
            del self.losses[: -(CHANGES + 1 + MAX_IN_A_ROW)]  # is_spike looks back no further

    def _is_high(self, loss: float, before: list[float]) -> bool:
        if not self.z or len(before) < LEVEL_LOSSES:
            return False
        recent = before[-(CHANGES + 1) :]
        changes = [abs(b - a) for a, b in pairwise(recent)]
        deviation = max(SMALLEST_DEVIATION, _CHANGE_TO_DEVIATION * median(changes))
        return loss > median(recent[-LEVEL_LOSSES:]) + self.z * deviation
