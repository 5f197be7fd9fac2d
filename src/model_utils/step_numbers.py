"""What a training step found: numbers that stay on the device until reading them keeps nothing waiting.

A GPU runs behind the program that gives it work. Reading a number waits until it has caught up, and it then idles until
it is given more. So the numbers of a step are copied in the background and read when the next step is under way.
Shapes: M micro-batches, P parameters.
"""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class StepNumbers:
    """The numbers of one step, which all processes share but for `losses_M`."""

    step: int
    """Its number, counted from 1."""
    lr: float
    losses_M: torch.Tensor
    """This process's share of the mean loss by micro-batch, nats, on the device."""
    norms_P: torch.Tensor
    """The L2 norm of each parameter's gradient, in the model's order, on the device."""
    numbers: torch.Tensor
    """Mean loss over all processes, norm of the whole gradient, 1 if skipped: (3,) float32, on its way to the CPU."""
    arrived: torch.cuda.Event | None

    @classmethod
    def send(
        cls, step: int, lr: float, losses_M: torch.Tensor, norms_P: torch.Tensor, numbers: torch.Tensor
    ) -> "StepNumbers":
        """Starts the copy of `numbers`, which are on the device, and returns at once."""
        if numbers.device.type != "cuda":
            return cls(step, lr, losses_M, norms_P, numbers, None)
        on_cpu = torch.empty(3, pin_memory=True).copy_(numbers, non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        return cls(step, lr, losses_M, norms_P, on_cpu, arrived)

    def read(self) -> tuple[float, float, bool]:
        """Mean loss in nats, gradient norm, and whether the step was skipped; waits for the step to be done."""
        if self.arrived is not None:
            self.arrived.synchronize()
        loss, norm, skipped = self.numbers.tolist()
        return loss, norm, bool(skipped)


class StepClock:
    """Time spent in training steps: it runs while they do, and stands still while something is measured or saved."""

    def __init__(self) -> None:
        self._lap_began: float | None = None

    def run(self) -> None:
        if self._lap_began is None:
            self._lap_began = time.perf_counter()

    def lap(self) -> float:
        """Seconds since the last lap, or since it began to run."""
        assert self._lap_began is not None, "a step is over, so the clock runs"
        now = time.perf_counter()
        seconds, self._lap_began = now - self._lap_began, now
        return seconds

    def stop(self) -> None:
        self._lap_began = None
