"""Lists the runs: a normalisation, the size of a part, the order of the images, a seed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

STEP = 32  # images a step, in every run
BY_BATCH = ("batch", "ghost", "renorm", "synchronised")  # use statistics of several images
BY_IMAGE = ("none", "group", "layer")
ORDERS = {"iid": None, "sorted parts": 4, "sorted steps": 1}  # name -> classes in a step


class Config(NamedTuple):
    """The settings of the runs, besides the photographs."""

    parts: tuple[int, ...] = (2, 4, 8, 32)  # images in a part of a step
    orders: tuple[str, ...] = tuple(ORDERS)
    seeds: tuple[int, ...] = (0, 1, 2)
    steps: int = 3_000
    judged: int = 310  # steps of images that a network is judged on
    rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)  # that each normalisation chooses from
    tuned_part: int = 8  # images in a part of the runs that choose a rate
    decay: float = 0.99  # of the running statistics, a step
    widths: tuple[int, ...] = (16, 32, 64)


class Case(NamedTuple):
    """One network to train."""

    norm: str  # of BY_BATCH or BY_IMAGE
    part: int  # images that share statistics; STEP for `BY_IMAGE`, where it has no effect
    order: str
    seed: int


def settings(config: Config, order: str) -> list[tuple[str, int]]:
    """Lists the normalisations, each with the sizes of parts for which it is another computation.

    A part that is the whole step makes batch, ghost and synchronised the same: the last runs.
    Where a step has one class, so has every part, and only the whole step is looked at.
    """
    small = [part for part in config.parts if part < STEP and order != "sorted steps"]
    each = [(norm, part) for norm in ("batch", "ghost") for part in small]
    renorm = [("renorm", part) for part in (*small, STEP)]
    return [*((norm, STEP) for norm in BY_IMAGE), *each, *renorm, ("synchronised", STEP)]


def cases(config: Config) -> Iterator[Case]:
    """Yields every run that differs from all others; all with one seed, then the next seed."""
    for seed in config.seeds:
        for order in config.orders:
            for norm, part in settings(config, order):
                yield Case(norm, part, order, seed)


def tuned_as(norm: str) -> str:
    """Returns the normalisation whose learning rate is taken: ghost and batch train alike."""
    return "batch" if norm == "ghost" else norm


def tuning_cases(config: Config) -> Iterator[Case]:
    """Yields the case by which each normalisation chooses its learning rate."""
    for norm in (*BY_IMAGE, "batch", "renorm", "synchronised"):
        part = config.tuned_part if norm in ("batch", "renorm") else STEP
        yield Case(norm, part, "iid", config.seeds[0])
