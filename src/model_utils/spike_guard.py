"""Loss spikes: which steps to skip before the optimizer touches anything.

A step is a spike if its loss lies more than z standard deviations above the level of the recent losses. Level and
deviation are medians, so that spikes among them hardly count: the level is the median of the last LEVEL_LOSSES, few
enough to follow a falling curve; the deviation comes from the changes between successive losses, which a trend
leaves as they are, where the losses' own spread would take a steep curve for noise.

After MAX_IN_A_ROW spikes on end the next loss is none, however high: the level has shifted, and only training can
bring it down. The level follows, the deviation too, and a run is never skipped to its end.
"""

import math
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

MAX_IN_A_ROW = 9
LEVEL_LOSSES = 2 * MAX_IN_A_ROW + 1  # the fewest of which a whole burst is less than half
CHANGES = 128  # the scatter of a deviation from so many is some 10%

# In nats. The losses of steps of 524,288 tokens scatter by 0.02; below half of that, such as where a loss hardly
# moves, rounding and the order of sums would pass for spikes, and skipping them would gain nothing.
SMALLEST_DEVIATION = 0.01

# The standard deviation of a normal distribution is 1.4826 median absolute deviations; a change has two losses' noise.
_CHANGE_TO_DEVIATION = 1.4826 / math.sqrt(2)


@dataclass
class SpikeGuard:
    """Decides step by step; the decision is a function of the losses alone, so equal in all processes."""

    z: float
    """Standard deviations above the level from which on a loss is a spike; 0 turns the guard off."""
    losses: list[float] = field(default_factory=list)
    """All the state: the recent losses, spikes included, the newest last."""

    def is_spike(self, loss: float) -> bool:
        """Whether to skip the step with this mean loss, in nats; False for one that is not finite."""
        if not math.isfinite(loss) or not self._is_high(loss, self.losses):
            return False
        newest = range(len(self.losses) - MAX_IN_A_ROW, len(self.losses))
        return not all(self._is_high(self.losses[i], self.losses[:i]) for i in newest)

    def add(self, loss: float) -> None:
        """Remembers the loss of a step, skipped or not; one that is not finite is passed over."""
        if self.z and math.isfinite(loss):
            self.losses.append(loss)
            del self.losses[: -(CHANGES + 1 + MAX_IN_A_ROW)]  # what is_spike looks back on

    def _is_high(self, loss: float, before: list[float]) -> bool:
        if not self.z or len(before) < LEVEL_LOSSES:
            return False
        recent = before[-(CHANGES + 1) :]
        changes = [abs(b - a) for a, b in pairwise(recent)]
        deviation = max(SMALLEST_DEVIATION, _CHANGE_TO_DEVIATION * median(changes))
        return loss > median(recent[-LEVEL_LOSSES:]) + self.z * deviation
