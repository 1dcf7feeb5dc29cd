"""Trains one run of a recipe, measures and saves it; or continues a run that was stopped.

A run is one program under ``jit``. On several devices the batch is split over them. The ``groups``
of a Batch Normalization layer decide which images share statistics: none for synchronised
statistics, as many as there are devices for local ones, and any other number between.

A run has a folder of its own, with its measurements as JSON lines, its events for TensorBoard and
its newest checkpoint. Started again it continues from there. Batches and random numbers depend on
the step alone, so the end is the same as without the stop.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import jbn.population
import jbn.training
from experiments.common import checkpoints
from experiments.images import data
from experiments.inception.notebook import Notebook, alone, check_same, described, lines
from experiments.inception.programs import Program, program
from experiments.inception.recipes import hyperparameters
from experiments.inception.runs import Options, Run, Sets

PATIENCE = 20  # so many steps in a row without finite gradients: the run has diverged
LOOK = 100  # steps from one check of the losses to the next


def train(run: Run, sets: Sets, out: Path, about: dict[str, Any], options: Options) -> Path:
    """Trains one network, or continues its training; returns the file of its measurements.

    A run that has ended is not started again.
    """
    path = out / run.folder / "measurements.jsonl"
    with alone(path.parent):
        identity = json.loads(json.dumps(described(run, options)))  # types as in the file
        check_same(path, identity)
        if not lines(path, "end"):
            _train(run, sets, path, about | identity, options)
    return path


def _train(run: Run, sets: Sets, path: Path, about: dict[str, Any], options: Options) -> None:
    made = program(
        run.recipe.of_network(),
        run.scale.of_network(),
        len(sets.train.classes),
        options.of_program(),
    )
    key, dropout_key = jax.random.split(jax.random.key(run.seed))
    hyper = {k: np.float32(v) for k, v in hyperparameters(run.recipe, run.scale, run.rate).items()}
    with (
        checkpoints.manager(path.parent / "checkpoints", keep=1) as manager,
        jax.set_mesh(made.mesh),
    ):
        state = checkpoints.resume(manager, made.start(key, hyper))
        header = {**about, "steps": run.steps, "options": options._asdict()}
        with Notebook(
            path, resume_from=int(state.step), tensorboard=options.tensorboard, **header
        ) as notebook:
            loop = Loop(run, sets, options, made, notebook)
            state, diverged = loop.advance(state, dropout_key, manager)
            if diverged or int(state.step) >= run.steps:
                loop.finish(state, diverged)


class Tally:
    """The losses of the steps since the last measurement, and the skipped steps."""

    def __init__(self) -> None:
        self._new: list[dict[str, Array]] = []  # on devices, so that `add` need not wait
        self._seen: list[tuple[float, bool]] = []
        self._in_a_row = 0

    def add(self, metrics: dict[str, Array]) -> None:
        """Adds the metrics of a step."""
        self._new.append(metrics)

    def _fetch(self) -> None:
        for metrics in jax.device_get(self._new):
            self._seen.append((float(metrics["loss"]), bool(metrics["skipped"])))
            self._in_a_row = self._in_a_row + 1 if metrics["skipped"] else 0
        self._new = []

    def diverged(self) -> bool:
        """Returns whether the last `PATIENCE` steps were all skipped."""
        self._fetch()
        return self._in_a_row >= PATIENCE

    def loss(self) -> float:
        """Returns the mean over the steps, in nats."""
        self._fetch()
        return float(np.mean([loss for loss, _ in self._seen]))

    def skipped(self) -> int:
        """Counts the steps without finite gradients."""
        return sum(skipped for _, skipped in self._seen)

    def forget(self) -> None:
        """Drops the losses of the steps, after a measurement."""
        self._seen = []


class Loop(NamedTuple):
    """The constants of a run, and its loop."""

    run: Run
    sets: Sets
    options: Options
    made: Program
    notebook: Notebook

    def advance(self, state: Any, key: Array, manager: Any) -> tuple[Any, bool]:
        """Trains to the end, or to the stop; returns the state and whether it diverged."""
        first, end = int(state.step), self.run.steps
        last = min(end, self.options.stop_after or end)
        tally = Tally()
        batches = self.batches(self.run.seed, first)
        with progress(self.run, first) as bar:
            try:
                for i in range(first + 1, last + 1):
                    state, metrics = self.made.step(state, self.made.place(next(batches)), key)
                    tally.add(metrics)
                    bar.update()
                    due = i % self.run.every == 0 or i == end
                    if (due or i % LOOK == 0) and tally.diverged():
                        self.measure(state, tally)
                        return state, True
                    if due:
                        bar.set_postfix_str(self.measure(state, tally))
                        tally.forget()
                    if i % self.options.checkpoint_every == 0 or i == last:
                        checkpoints.save(manager, state)
            finally:
                batches.close()
                manager.wait_until_finished()
        return state, False

    def batches(self, seed: int, start: int) -> data.Batches:
        """Makes this process' share of the training batches, as the recipe requires."""
        run, n = self.run, jax.process_count()
        return data.train_batches(
            self.sets.train,
            batch=run.scale.batch // n,
            size=run.scale.size,
            seed=seed,
            crop=run.scale.crop,
            distortion=run.recipe.distortion,
            shuffle=run.recipe.shuffle,
            shards=min(run.scale.shards, len(self.sets.train)),
            workers=self.options.workers,
            process_index=jax.process_index(),
            process_count=n,
            start=start,
        )

    def measure(self, state: Any, tally: Tally) -> str:
        """Writes a measurement: training loss, and validation accuracy by the moving averages."""
        judged = self.judge(state.params, state.stats)
        row = {"train_loss": tally.loss(), "skipped": tally.skipped(), **judged}
        self.notebook.write("measurement", step=int(state.step), **row)
        return f"loss {row['train_loss']:.3f}, accuracy {judged['top1']:.1%}"

    def judge(self, params: Any, stats: Any) -> dict[str, float]:
        """Computes loss, top-1 and top-5 accuracy on validation images by these statistics."""
        n = jax.process_count()
        batches = data.eval_batches(
            self.sets.val,
            batch=self.run.scale.eval_batch // n,
            size=self.run.scale.size,
            workers=self.options.workers,
            process_index=jax.process_index(),
            process_count=n,
        )
        try:
            state: Any = jbn.training.TrainState(jnp.zeros((), jnp.int32), params, stats, ())
            return jbn.training.evaluate(self.made.judge, state, map(self.made.place, batches))
        finally:
            batches.close()

    def finish(self, state: Any, diverged: bool) -> None:
        """Writes the last line: accuracy by moving averages, and by the exact statistics."""
        judged = self.judge(state.params, state.stats)
        results: dict[str, Any] = {"diverged": diverged, **judged}
        if self.run.recipe.batch_norm and not diverged:
            exact = self.judge(state.params, self.population(state))
            results |= {f"{name}_population": value for name, value in exact.items()}
        self.notebook.write("end", step=int(state.step), **results)

    def population(self, state: Any) -> Any:
        """Computes the exact statistics (Algorithm 2) over images prepared as in training."""
        wanted = min(self.run.scale.population, len(self.sets.train))
        n = max(1, wanted // self.run.scale.batch)
        batches = self.batches(self.run.seed + 1_000_000, 0)
        try:
            some = map(self.made.place, itertools.islice(batches, n))
            return jbn.population.estimate(self.made.collect, state.params, state.stats, some)
        finally:
            batches.close()


def progress(run: Run, first: int) -> tqdm:
    """Makes the progress bar; of several processes the first one shows it."""
    return tqdm(
        total=run.steps,
        initial=first,
        desc=f"{run.name}, seed {run.seed}",
        unit=" steps",
        disable=jax.process_index() != 0,
    )
