"""Compares no normalisation, that of each feature, and whitening of groups and of all features."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.common import timing
from experiments.common.records import Records
from experiments.nets.inputs import as_input
from experiments.whitening.networks import LAYERS, from_bits, resnet, sigmoids
from experiments.whitening.training import Data, Run, Task, order, programs, train

TASKS = {
    "mnist": Task(sigmoids, from_bits, 200, 4_000, 200, 1_000, (0.3, 1.0, 3.0, 10.0)),
    "cifar": Task(resnet, as_input, 64, 500, 50, 150, (0.03, 0.1, 0.3), momentum=0.9),
}
SEEDS = (0, 1, 2)


class Result(NamedTuple):
    """Holds the trainings of a task with one layer, and the time of a step."""

    layer: str
    rate: float
    step_ms: float  # milliseconds of a step, in turns with the other layers
    runs: list[Run]  # one for each seed


def compare(
    task: Task, data: Data, seeds: Sequence[int], records: Records, *, rounds: int = 3
) -> list[Result]:
    """Chooses a rate for each layer, trains it, and measures the time of a step."""
    rates = {layer: chosen_rate(task, layer, data, records) for layer in LAYERS}
    milliseconds = step_times(task, data, rounds)
    every = np.arange(len(data.labels))
    results = []
    for layer, rate in rates.items():
        runs = []
        for seed in seeds:
            run = train(task, layer, rate, seed, data, task.steps, every)
            row = {"layer": layer, "rate": rate, "seed": seed, "last_loss": run.loss}
            row |= {"settled": run.settled, "chunk": task.chunk}
            records.write("run", **row, accuracies=[round(v, 4) for v in run.accuracies])
            runs.append(run)
        records.write("time", layer=layer, step_ms=milliseconds[layer])
        results.append(Result(layer, rate, milliseconds[layer], runs))
    return results


def chosen_rate(task: Task, layer: str, data: Data, records: Records) -> float:
    """Returns the rate with the best accuracy on training images that these runs do not see.

    It is judged by settled statistics: a short training says little about running averages.
    """
    n = min(len(data.labels) // 6, len(data.test_labels))
    shuffled = np.random.default_rng(0).permutation(len(data.labels))
    unseen, seen = shuffled[:n], shuffled[n:]
    split = data._replace(test_images=data.images[unseen], test_labels=data.labels[unseen])
    found = {}
    for rate in task.rates:
        run = train(task, layer, rate, SEEDS[0], split, task.tuning, seen)
        found[rate] = run.settled
        row = {"layer": layer, "rate": rate, "accuracy": run.accuracies[-1]}
        records.write("tuning", **row, settled=run.settled, last_loss=run.loss)
    return max(found, key=lambda rate: found[rate])


def step_times(task: Task, data: Data, rounds: int) -> dict[str, float]:
    """Measures the milliseconds of a step of every layer, in turns."""
    rows = order(np.arange(len(data.labels)), task, task.chunk, 0)
    calls: dict[str, Any] = {}
    for layer in LAYERS:
        run = programs(task, layer)
        state = run.init(jax.random.key(0), task.rates[0], data.images[0])
        args = state, jnp.asarray(data.images), jnp.asarray(data.labels), rows
        calls[layer] = lambda run=run, args=args: jax.block_until_ready(run.steps(*args))
    samples = timing.interleave(calls, rounds, at_least=0.05)
    return {layer: 1e3 * samples.median(layer) / task.chunk for layer in LAYERS}


def first_step(accuracies: Sequence[float], chunk: int, goal: float) -> int | None:
    """Returns the first measured step whose accuracy reaches the goal."""
    reached = [i for i, value in enumerate(accuracies, 1) if value >= goal]
    return chunk * reached[0] if reached else None


def table(task: Task, results: Sequence[Result]) -> str:
    """Formats the results: accuracies at the end; steps and seconds of the mean over the seeds.

    The goal is the mean final accuracy of the network without normalisation.
    """
    curves = {r.layer: np.mean([run.accuracies for run in r.runs], 0) for r in results}
    goal = float(curves["none"][-1])
    lines = [
        "| layer | rate | loss | test accuracy, running | settled | ms a step "
        f"| steps to {goal:.1%} | seconds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in results:
        loss = np.mean([run.loss for run in r.runs])
        last = spread([run.accuracies[-1] for run in r.runs])
        settled = spread([run.settled for run in r.runs])
        steps = first_step(list(curves[r.layer]), task.chunk, goal)
        reached = "never | " if steps is None else f"{steps:,} | {steps * r.step_ms / 1e3:.1f}"
        row = f"| {r.layer} | {r.rate:g} | {loss:.3f} | {last} | {settled}"
        lines.append(f"{row} | {r.step_ms:.1f} | {reached} |")
    return "\n".join(lines)


def spread(values: Sequence[float]) -> str:
    """Formats a mean and, of several values, the standard deviation."""
    some = len(values) > 1
    return f"{np.mean(values):.1%}" + (f" ± {np.std(values, ddof=1):.1%}" if some else "")
