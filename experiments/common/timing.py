"""How long do competing programs take? Interleaved rounds in one process; ratios within a round.

A machine that does something else for a second slows all competitors of that round, so the ratio of
two times of one round says more than either, and the median of many such ratios more than the ratio
of two averages. This file knows nothing of JAX: a competitor is a function that returns when its
work is done.
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

# What the process has to be started with, as glibc and OpenMP read it once. By default glibc asks
# the kernel for new, empty pages for every large array and hands them back with it: on a CPU a
# program that writes 25 MB then waits for 6,000 page faults in each call, up to nine times its own
# work, and that is what would be measured. So freed memory is kept for the next array. OpenMP's
# threads, PyTorch's, spin while they wait: into the next competitor's turn, and, where something
# else runs beside the benchmark, for up to 100 ms at each call. So they sleep.
ENVIRONMENT = {
    "MALLOC_MMAP_MAX_": "0",  # no array gets a mapping of its own
    "MALLOC_TRIM_THRESHOLD_": "100000000000",  # bytes: nothing is handed back
    "MALLOC_TOP_PAD_": "536870912",  # bytes: grow by half a gigabyte at once
    "OMP_WAIT_POLICY": "passive",  # PyTorch's threads then have to wake up: tiny layers show it
}


def restart_with_environment(module: str, argv: Sequence[str]) -> None:
    """Starts ``python -m module argv`` again in place of this process, if it lacks `ENVIRONMENT`.

    To be called before JAX is imported: a JAX that had a TPU or the memory of a GPU would still
    hold it. What the user has set stays as it is.
    """
    missing = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if missing and sys.platform == "linux":
        command = [sys.executable, "-m", module, *argv]
        os.execve(sys.executable, command, {**os.environ, **missing})


class Samples(NamedTuple):
    """Seconds a call of each competitor: one number a round, in the order of the rounds."""

    seconds: Mapping[str, Sequence[float]]

    def median(self, name: str) -> float:
        return float(np.median(self.seconds[name]))

    def ratio(self, name: str, baseline: str) -> Ratio:
        """How many times the baseline's time `name` takes: below 1 it is the faster one."""
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
    """Times every competitor once a round, in an order that is shuffled anew for each round.

    Args:
      competitors: functions that return when their work is done.
      rounds: how often each is measured.
      at_least: seconds that one measurement takes; a shorter call is repeated and divided.

    Returns:
      Seconds a call. Before each measurement a competitor runs once without being timed: the
      threads that another library leaves spinning come to rest, and the caches hold its own arrays.
    """
    calls = {name: calls_for(call, at_least) for name, call in competitors.items()}
    seconds: dict[str, list[float]] = {name: [] for name in competitors}
    for number in range(rounds):
        for name in shuffled(competitors, number):
            competitors[name]()
            seconds[name].append(time_calls(competitors[name], calls[name]))
    return Samples(seconds)


def shuffled(names: Iterable[str], seed: int) -> list[str]:
    """The names in an order that depends on the seed: nobody always comes after the same other."""
    order = list(names)
    random.Random(seed).shuffle(order)
    return order


def time_calls(call: Callable[[], object], calls: int) -> float:
    """Seconds a call, over that many."""
    began = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - began) / calls


def calls_for(call: Callable[[], object], at_least: float) -> int:
    """How many calls take `at_least` seconds; the first call, which may compile, is not counted."""
    call()
    calls = 1
    while (seconds := time_calls(call, calls) * calls) < at_least / 2:
        calls *= 2
    return max(calls, math.ceil(calls * at_least / seconds))


def geometric_mean(values: Iterable[float]) -> float:
    """The mean of ratios: that of 2 and 1/2 is 1.

    Raises:
      ValueError: there are no values, or one is not above 0.
    """
    values = list(values)
    if not values or min(values) <= 0:
        raise ValueError(f"a geometric mean needs values, all above 0; got {values}.")
    return math.exp(math.fsum(map(math.log, values)) / len(values))
