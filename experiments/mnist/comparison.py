"""Trains the networks of Figure 1, with and without Batch Normalization, and measures them."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common.records import Records, aligned
from experiments.images.digits import Digits
from experiments.mnist.mlp import NETS, SIZES, init_mlp
from experiments.mnist.training import Learner, chunks, evaluate, train_chunk

PERCENTILES = (15, 50, 85)


class Config(NamedTuple):
    """The settings of a run of Figure 1, besides the images."""

    steps: int = 50_000
    every: int = 250  # steps from one measurement to the next
    seed: int = 0
    learning_rate: float = 0.1
    init_std: float = 0.03


class History(NamedTuple):
    """The measurements of one network, one entry every ``Config.every`` steps."""

    steps: np.ndarray  # [T] training steps done
    test_accuracy: np.ndarray  # [T] fraction of the test images
    train_loss: np.ndarray  # [T] nats, mean over the steps since the last entry
    percentiles: np.ndarray  # [T, 3, units] of every last hidden unit's input, over test images
    seconds: float  # training and measuring, compilation included


def train(config: Config, digits: Digits, net: str, records: Records) -> History:
    """Trains one network and measures it every ``config.every`` steps."""
    began = time.perf_counter()
    init_key, data_key = jax.random.split(jax.random.key(config.seed))
    learner = Learner(*init_mlp(init_key, SIZES, config.init_std, NETS[net]))
    rate = jnp.float32(config.learning_rate)
    train_images, train_labels, test_images, test_labels = map(jnp.asarray, digits)
    rows = []
    with tqdm(total=config.steps, desc=f"{net:>10}", unit=" steps") as bar:
        for first, steps in chunks(config.steps, config.every):
            learner, loss = train_chunk(
                learner, rate, jnp.int32(first), data_key, train_images, train_labels, steps
            )
            accuracy, inputs = evaluate(learner, test_images, test_labels)
            row = {
                "step": first + steps,
                "test_accuracy": float(accuracy),
                "train_loss": float(loss),
            }
            records.write("measurement", net=net, **row)
            rows.append((*row.values(), np.percentile(inputs, PERCENTILES, axis=0)))
            bar.update(steps)
            bar.set_postfix_str(f"test accuracy {row['test_accuracy']:.1%}, loss {loss:.4f}")
    steps, accuracies, losses, percentiles = map(np.array, zip(*rows, strict=True))
    return History(steps, accuracies, losses, percentiles, time.perf_counter() - began)


def typical_unit(histories: dict[str, History]) -> int:
    """Finds the last hidden unit whose input moves neither much nor little, in both networks.

    In each network the units are ranked by how far their input's median moves during training; the
    typical unit is the one whose ranks are closest to the middle, summed over the networks.
    """
    from_middle = np.zeros(SIZES[-2])
    for history in histories.values():
        ranks = wander(history).argsort(kind="stable").argsort(kind="stable")
        from_middle += abs(ranks - (len(ranks) - 1) / 2)
    return int(from_middle.argmin())


def wander(history: History) -> np.ndarray:
    """Returns the standard deviation over time of every unit's median input, ``[units]``."""
    return history.percentiles[:, 1].std(axis=0)


def spread(history: History, when: int) -> float:
    """Returns the 85th minus the 15th percentile of a unit's input; the median over the units."""
    return float(np.median(history.percentiles[when, 2] - history.percentiles[when, 0]))


def summary(net: str, history: History) -> dict[str, Any]:
    """Returns one network's results: a JSON line, and a row of the table."""

    def steps_to(accuracy: float) -> int | None:
        reached = history.test_accuracy >= accuracy
        return int(history.steps[reached.argmax()]) if reached.any() else None

    return {
        "net": net,
        "steps_to_80": steps_to(0.8),
        "steps_to_90": steps_to(0.9),
        "test_accuracy": float(history.test_accuracy[-1]),
        "best_accuracy": float(history.test_accuracy.max()),
        "train_loss": float(history.train_loss[-1]),
        "spread_first": spread(history, 0),
        "spread_last": spread(history, -1),
        "wander": float(np.median(wander(history))),
        "seconds": history.seconds,
    }


def write_inputs(records: Records, net: str, history: History, unit: int) -> None:
    """Writes panels (b, c): the percentiles of one unit's input at every measurement."""
    for step, values in zip(history.steps, history.percentiles[:, :, unit], strict=True):
        percentiles = dict(zip(map(str, PERCENTILES), values.round(4).tolist(), strict=True))
        records.write("input", net=net, unit=unit, step=int(step), percentiles=percentiles)


def table(rows: list[dict[str, Any]]) -> str:
    """Formats the results, one network a line; spreads are of the first and last measurement."""
    lines = [
        [
            "network",
            "steps to 80%",
            "to 90%",
            "test accuracy",
            "best",
            "train loss",
            "spread",
            "time",
        ]
    ]
    for row in rows:
        steps = [f"{row[k]:,}" if row[k] else "never" for k in ("steps_to_80", "steps_to_90")]
        accuracies = [f"{row[k]:.1%}" for k in ("test_accuracy", "best_accuracy")]
        inputs = f"{row['spread_first']:.2g} -> {row['spread_last']:.2g}"
        rest = f"{row['train_loss']:.4f}", inputs, f"{row['seconds']:.0f} s"
        lines.append([row["net"], *steps, *accuracies, *rest])
    return aligned(lines)
