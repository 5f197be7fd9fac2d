"""Spikes are skipped, and the noise, the slope and the new levels of real losses are not."""

import json
import math

import numpy as np
import pytest

from src.model_utils.spike_guard import SpikeGuard

# The mean loss of every step of `pretrain.py debug`: a batch is 2,048 tokens, so the noise is 0.25 nats.
_REAL = """
10.86 9.87 9.89 8.98 9.06 9.07 7.69 8.56 7.76 7.04 7.22 6.29 6.67 6.12 6.28 5.79 6.77 6.15 5.97 6.29 6.10 6.25 6.28
6.24 6.17 6.35 6.26 6.11 6.26 6.13 6.39 6.22 5.70 6.41 5.87 6.05 6.06 6.29 5.82 5.38 6.26 6.47 5.68 6.30 5.87 6.20
5.87 5.87 5.87 6.24 6.19 6.25 6.09 6.24 5.52 5.81 6.08 6.07 5.97 6.06 5.92 5.62 6.20 6.22 5.73 5.75 5.87 5.67 6.29
5.73 6.00 5.55 5.96 5.51 5.76 6.14 5.52 6.00 4.99 5.09 6.08 5.51 5.44 5.45 5.79 5.30 5.60 5.70 5.42 6.18 5.19 5.39
5.42 5.57 5.24 5.38 5.69 5.58 5.25 5.29 4.91 5.17 5.15 5.20 5.86 5.21 4.88 5.36 5.32 5.34 5.24 5.51 5.25 5.42 5.17
5.41 4.84 5.21 5.34 5.50 5.46 5.25 5.27 5.44 5.20 5.41 5.62 5.54 4.96 5.10 5.50 5.02 5.15 5.53 5.28 5.24 5.02 5.09
5.34 5.41 4.91 5.47 4.99 4.58 5.13 5.40 5.26 4.76 5.04 5.44 5.31 5.11 4.96 5.33 4.84 5.05 5.30 5.22 5.17 5.28 4.72
5.13 5.17 4.78 5.02 5.15 4.93 5.27 5.61 4.97 4.79 5.18 4.90 4.83 4.68 4.66 4.78 4.86 4.66 4.95 4.69 4.30 5.15 5.12
5.49 4.69 5.23 4.98 5.12 4.89 4.92 4.65 4.91 5.24 5.12 4.36 5.01 4.75 5.15 4.89 4.67 5.15 4.69 5.07 4.66 5.01 4.99
4.78 4.76 4.74 5.32 5.21 4.24 4.67 4.68 4.32 4.38 5.43 4.72 4.72 5.41 5.02 4.36 5.16 4.82 4.63 4.84 5.21 4.83 4.33
4.93 4.76 4.80 4.58 4.91 4.52 4.79 4.77 4.52 4.74
"""
REAL = [float(loss) for loss in _REAL.split()]


def skipped(losses: list[float], z: float = 6.0) -> list[int]:
    """The steps that a guard skips on its way through `losses`."""
    guard, steps = SpikeGuard(z), []
    for step, loss in enumerate(losses):
        if guard.is_spike(loss):
            steps.append(step)
        guard.add(loss)
    return steps


def noise(count: int, deviation: float, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0.0, deviation, count)


@pytest.mark.parametrize("z", [4.0, 6.0])
def test_a_real_run_has_no_spikes(z: float):
    assert skipped(REAL, z) == []


@pytest.mark.parametrize("burst", [1, 3, 9])
@pytest.mark.parametrize("start", [19, 30, 60, 100, 150, 225])
def test_spikes_in_a_real_run_are_skipped_and_nothing_else(start: int, burst: int):
    losses = np.array(REAL)
    losses[start : start + burst] += 5.0
    assert skipped(losses.tolist(), 4.0) == [*range(start, start + burst)]


@pytest.mark.parametrize("burst", [1, 2, 9])
@pytest.mark.parametrize("size", [1.0, 2.0, 5.0])
def test_with_the_noise_of_large_batches_one_nat_is_enough(size: float, burst: int):
    steps = np.arange(600)
    losses = 2.5 + 8.0 * (1 + steps / 5) ** -0.7 + noise(600, 0.02)
    for start in (60, 200, 590):
        losses[start : start + burst] += size
    assert skipped(losses.tolist()) == [start + i for start in (60, 200, 590) for i in range(burst)]


@pytest.mark.parametrize("z", [3.0, 8.0])
def test_the_limit_is_the_documented_one(z: float):
    losses = (3.0 + noise(300, 0.1) - 0.002 * np.arange(300)).tolist()
    for count in (19, 20, 129, 130, 300):
        guard = SpikeGuard(z)
        for loss in losses[:count]:
            guard.add(loss)
        changes = np.abs(np.diff(losses[max(0, count - 129) : count]))
        limit = np.median(losses[count - 19 : count]) + z * 1.4826 * np.median(changes) / np.sqrt(2)
        assert not guard.is_spike(limit - 1e-9)
        assert guard.is_spike(limit + 1e-9)


def test_a_trend_does_not_widen_the_limit():
    """The losses' own spread is 0.58 nats here, their noise 0.02."""
    falling = 5.0 - 0.02 * np.arange(100) + noise(100, 0.02)
    assert skipped([*falling.tolist(), 3.7]) == [100]


def test_a_constant_loss_needs_a_rise_of_z_hundredths():
    assert skipped([3.0] * 500) == []
    assert skipped((3.0 + noise(500, 1e-7)).tolist()) == []
    assert skipped([*[3.0] * 50, 3.0599]) == []
    assert skipped([*[3.0] * 50, 3.0601]) == [50]


@pytest.mark.parametrize("rise", [0.5, 5.0])
def test_nine_steps_of_a_new_level_are_skipped_and_the_tenth_is_not(rise: float):
    losses = 3.0 + noise(400, 0.02)
    losses[200:] += rise
    assert skipped(losses.tolist()) == [*range(200, 209)]


def test_a_new_level_with_more_noise_is_learned():
    losses = 3.0 + noise(1_000, 0.02)
    losses[200:] += 1.0 + noise(800, 0.5, seed=1)
    steps = skipped(losses.tolist())
    assert steps[:9] == [*range(200, 209)]
    assert 209 not in steps
    assert max(steps) < 200 + 64 + 9  # half of the 128 changes are new then


@pytest.mark.parametrize("seed", range(4))
def test_what_is_forgotten_decides_nothing(seed: int):
    """Against the definition in the module's docstring, applied to all losses at once."""
    losses = np.repeat(np.random.default_rng(seed).normal(3.0, 2.0, 150), 20) + noise(3_000, 0.3, seed)
    high = np.zeros(3_000, bool)
    for step in range(19, 3_000):
        deviation = 1.4826 * np.median(np.abs(np.diff(losses[max(0, step - 129) : step]))) / np.sqrt(2)
        high[step] = losses[step] > np.median(losses[step - 19 : step]) + 2.0 * deviation
    expected = [step for step in range(3_000) if high[step] and not high[step - 9 : step].all()]
    assert len(expected) > 100
    assert skipped(losses.tolist(), 2.0) == expected


def test_the_first_losses_are_not_judged():
    assert skipped([*[3.0] * 18, 9.0]) == []
    assert skipped([*[3.0] * 19, 9.0]) == [19]


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_left_to_others_and_forgotten(bad: float):
    clean = [*REAL[:120], 15.0, *REAL[120:]]
    guard, expected = SpikeGuard(6.0), SpikeGuard(6.0)
    for loss in clean:
        guard.add(bad)
        assert not guard.is_spike(bad)
        assert guard.is_spike(loss) == expected.is_spike(loss)
        guard.add(loss)
        expected.add(loss)
    assert guard == expected


def test_resuming_from_json_is_exact():
    losses = [*REAL[:150], *[11.0 + 0.1 * i for i in range(12)], *REAL[150:]]
    whole = skipped(losses)
    for stop in (5, 19, 100, 151, 155, 159, 170):
        guard = SpikeGuard(6.0)
        for loss in losses[:stop]:
            guard.add(loss)
        resumed = SpikeGuard(6.0, json.loads(json.dumps(guard.losses)))
        steps = []
        for step in range(stop, len(losses)):
            if resumed.is_spike(losses[step]):
                steps.append(step)
            resumed.add(losses[step])
        assert steps == [step for step in whole if step >= stop]
    assert whole == [*range(150, 159)]


def test_the_state_does_not_grow():
    guard = SpikeGuard(6.0)
    for step in range(10_000):
        guard.add(float(step % 7))
    assert len(guard.losses) < 150


def test_zero_turns_it_off():
    guard = SpikeGuard(0.0)
    for loss in REAL:
        guard.add(loss)
    assert not guard.is_spike(1e9)
    assert guard.losses == []
