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
from experiments.whitening.training import Data, Task, order, programs, train

TASKS = {
    "mnist": Task(sigmoids, from_bits, 200, 4_000, 200, 1_000, (0.1, 0.3, 1.0, 3.0)),
    "cifar": Task(resnet, as_input, 64, 1_000, 50, 300, (0.03, 0.1, 0.3), momentum=0.9),
}
SEEDS = (0, 1, 2)


class Result(NamedTuple):
    """What one layer made of a task."""

    layer: str
    rate: float
    step_ms: float  # milliseconds of a step, in turns with the other layers
    accuracies: list[list[float]]  # for each seed, after every chunk


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
            accuracies, loss = train(task, layer, rate, seed, data, task.steps, every)
            row = {"layer": layer, "rate": rate, "seed": seed, "last_loss": loss}
            records.write("run", **row, chunk=task.chunk, accuracies=shortened(accuracies))
            runs.append(accuracies)
        records.write("time", layer=layer, step_ms=milliseconds[layer])
        results.append(Result(layer, rate, milliseconds[layer], runs))
    return results


def shortened(values: Sequence[float]) -> list[float]:
    """Rounds accuracies to four digits."""
    return [round(value, 4) for value in values]


def chosen_rate(task: Task, layer: str, data: Data, records: Records) -> float:
    """Returns the rate with the best accuracy on training images that these runs do not see."""
    n = min(len(data.labels) // 6, len(data.test_labels))
    shuffled = np.random.default_rng(0).permutation(len(data.labels))
    unseen, seen = shuffled[:n], shuffled[n:]
    split = data._replace(test_images=data.images[unseen], test_labels=data.labels[unseen])
    found = {}
    for rate in task.rates:
        accuracies, loss = train(task, layer, rate, SEEDS[0], split, task.tuning, seen)
        found[rate] = accuracies[-1]
        records.write("tuning", layer=layer, rate=rate, accuracy=found[rate], last_loss=loss)
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
    """Formats the results: accuracy at the end; steps and seconds to the best without a layer.

    The goal is the mean final accuracy of the network without normalisation; a seed that does not
    reach it makes the entry "never".
    """
    goal = float(np.mean([run[-1] for run in results[0].accuracies]))
    lines = [
        f"| layer | rate | accuracy at the end | ms a step | steps to {goal:.1%} | seconds |",
        "|---|---|---|---|---|---|",
    ]
    for r in results:
        ends = np.array([run[-1] for run in r.accuracies])
        firsts = [first_step(run, task.chunk, goal) for run in r.accuracies]
        known = [f for f in firsts if f is not None]
        steps = float(np.mean(known)) if len(known) == len(firsts) else None
        reached = "never | " if steps is None else f"{steps:,.0f} | {steps * r.step_ms / 1e3:.1f}"
        end = f"{ends.mean():.1%} ± {ends.std(ddof=1) if len(ends) > 1 else 0:.1%}"
        lines.append(f"| {r.layer} | {r.rate:g} | {end} | {r.step_ms:.1f} | {reached} |")
    return "\n".join(lines)
