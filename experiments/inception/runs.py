"""The options of a run, and the source of its images."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from experiments.images import data
from experiments.inception.recipes import Recipe, Scale, n_steps

STATISTICS = ("synchronised", "ghost", "local")


class Options(NamedTuple):
    """The settings of a run that decide how it is computed and what it leaves."""

    workers: int = 0
    devices: int | None = None  # None: all
    statistics: str = "synchronised"
    ghost_batch: int = 16  # images that share statistics, if these are "ghost"
    bfloat16: bool = False
    auxiliary: bool = False
    tensorboard: bool = False
    checkpoint_every: int = 1_000  # steps
    stop_after: int | None = None  # steps; the run is interrupted there

    def of_program(self) -> Options:
        """Returns the options that the compiled program depends on; the rest are defaults."""
        names = "devices", "statistics", "ghost_batch", "bfloat16", "auxiliary"
        return Options(**{name: getattr(self, name) for name in names})


class Run(NamedTuple):
    """One network to train."""

    name: str  # of the recipe
    recipe: Recipe
    scale: Scale
    rate: float  # the baseline's first rate
    seed: int

    @property
    def folder(self) -> str:
        """The folder of its results."""
        words = self.name.replace(",", "").replace("%", "").split()
        return f"{'-'.join(words)}-rate{self.rate:g}-seed{self.seed}"

    @property
    def steps(self) -> int:
        """The number of its steps."""
        return n_steps(self.recipe, self.scale)

    @property
    def every(self) -> int:
        """Steps from one measurement to the next; short runs are measured twice as often."""
        shorter = 1 if self.recipe.share == 1 else 2
        return max(1, self.scale.steps // (shorter * self.scale.evaluations))


class Sets(NamedTuple):
    """The images for training and validation."""

    train: data.ImageSet
    val: data.ImageSet


def load(dataset: str, data_dir: str | None) -> Sets:
    """Opens the images of a data set in a folder; "smoke" has made-up ones, and needs no folder."""
    if dataset == "smoke":
        return Sets(*data.stripes(320, 80))
    assert data_dir is not None
    return Sets(*data.open_dataset(data_dir, dataset))


def results_of(dataset: str) -> Path:
    """Returns the default folder of results: every data set has its own."""
    return Path("results/inception", dataset)
