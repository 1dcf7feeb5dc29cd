"""Lists the runs, and tells which of them are the same."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

# If several are the same on a number of devices, the first in this order runs for all of them.
STATISTICS = ("local", "synchronised", "ghost")


class Config(NamedTuple):
    """The settings of the runs, besides the photographs."""

    devices: tuple[int, ...] = (1, 2, 4, 8)
    per_device: int = 2  # images a device and step
    images: int = 16_000  # that a run trains on
    seeds: tuple[int, ...] = (0, 1)
    learning_rate: float = 0.1  # the first rate, at 16 images a step
    window: int = 2_000  # images that the running statistics average over
    every: int = 2_000  # images from one movement of the progress bar to the next
    judged: int = 2_560  # images of each set that a network is judged on
    widths: tuple[int, ...] = (16, 32, 64)
    stem_stride: int = 2


class Case(NamedTuple):
    """One network to train."""

    statistics: str
    devices: int
    seed: int


def sharing(statistics: str, devices: int) -> int:
    """Returns how many devices share statistics. An odd number has no pairs: ghost is local."""
    pair = 2 if devices % 2 == 0 else 1
    return {"local": 1, "ghost": pair, "synchronised": devices}[statistics]


def runs_as(statistics: str, devices: int) -> str:
    """Returns the statistics that run for these: on 1 device all are the same, on 2 two are."""
    shared = sharing(statistics, devices)
    return next(name for name in STATISTICS if sharing(name, devices) == shared)


def cases(config: Config) -> Iterator[Case]:
    """Yields every network that differs from all before; all with one seed, then the next seed."""
    for seed, devices in itertools.product(config.seeds, config.devices):
        for statistics in STATISTICS:
            if runs_as(statistics, devices) == statistics:
                yield Case(statistics, devices, seed)
