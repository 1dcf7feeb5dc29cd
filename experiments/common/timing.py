"""Times competing programs in interleaved rounds of one process, and compares them within a round.

A machine that is busy for a second slows all competitors of that round. So the ratio of two times
of one round is more reliable than either time, and the median of many such ratios is more reliable
than the ratio of two averages. This file does not depend on JAX: a competitor is a function that
returns when its work is done.
"""

from __future__ import annotations

import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

# The process must start with these variables: glibc and OpenMP read them only once. By default
# glibc requests new, empty pages from the kernel for every large array and returns them when it is
# freed: on a CPU a program that writes 25 MB then waits for 6,000 page faults in each call, up to
# nine times its own work, and the benchmark would measure that. So glibc keeps freed memory for the
# next array. The threads of OpenMP, which PyTorch uses, spin while they wait: into the next
# competitor's turn and, if another program runs beside the benchmark, for up to 100 ms at each
# call. So they sleep.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",  # no array gets a mapping of its own
    "MALLOC_TRIM_THRESHOLD_": "100000000000",  # bytes: no memory is returned
    "MALLOC_TOP_PAD_": "536870912",  # bytes: grow by half a gigabyte at once
    "OMP_WAIT_POLICY": "passive",  # PyTorch's threads must wake up, which slows tiny layers
}


def restart_with_environment(module: str, argv: Sequence[str]) -> None:
    """Replaces this process by ``python -m module argv``, if it lacks variables of `ENVIRONMENT`.

    Call it before JAX is imported: after that JAX could still hold a TPU or the memory of a GPU.
    Variables that the user has set keep their values.
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        command = [sys.executable, "-m", module, *argv]
        os.execve(sys.executable, command, {**os.environ, **missing})


class Samples(NamedTuple):
    """The seconds per call of each competitor: one number a round, in the order of the rounds."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, baseline: str) -> Ratio:
        """Returns the time of `name` relative to the baseline's: below 1 `name` is faster."""
        mine, other = (np.asarray(self.seconds[n]) for n in (name, baseline))
        low, median, high = np.percentile(mine / other, (25, 50, 75))
        return Ratio(float(median), float(low), float(high))


class Ratio(NamedTuple):
    """A ratio of times: the median over the rounds, and the quartiles around it."""

    median: float
    low: float
    high: float


def interleave(
    competitors: Mapping[str, Callable[[], object]], rounds: int, at_least: float = 2e-3
) -> Samples:
    """Times every competitor once a round, in a new random order each round.

    Args:
      competitors: functions that return when their work is done.
      rounds: how often each competitor is measured.
      at_least: seconds that one measurement takes; a shorter call is repeated and averaged.

    Returns:
      The seconds per call. Before each measurement a competitor runs once untimed, so that the
      threads that another library left spinning stop and the caches hold its own arrays.
    """
    calls = {name: calls_for(call, at_least) for name, call in competitors.items()}
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(rounds):
        for name in shuffled(competitors, number):
            competitors[name]()
            seconds[name].append(time_calls(competitors[name], calls[name]))
    return Samples(seconds)


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """Shuffles the names by the seed, so that no name always follows the same other one."""
    order = list(names)
    random.Random(seed).shuffle(order)
    return order


def time_calls(call: Callable[[], object], calls: int) -> float:
    """Returns the mean seconds of so many calls."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def calls_for(call: Callable[[], object], at_least: float) -> int:
    """Counts the calls that take `at_least` seconds, after a first one, which may compile."""
    call()
    calls = 1
    while (seconds := time_calls(call, calls) * calls) < at_least / 2:
        calls *= 2
    return max(calls, math.ceil(calls * at_least / seconds))


def geometric_mean(values: Iterable[float]) -> float:
    """Returns the geometric mean of ratios: that of 2 and 1/2 is 1.

    Raises:
      ValueError: there are no values, or one is not above 0.
    """
    values = list(values)
    if not values or min(values) <= 0:
        raise ValueError(f"a geometric mean needs values, all above 0; got {values}.")
    return math.exp(math.fsum(map(math.log, values)) / len(values))
