"""Finds the initial scales and learning rates at which a sigmoid network trains at all.

The paper's remark (section 3.3): with Batch Normalization a layer's output does not depend on the
scale of its weights, BN(aWu) = BN(Wu), and higher learning rates become possible. Here the networks
of Figure 1 are trained from a grid of both, for 3,000 steps each; their test accuracy is compared.

Run it with ``python -m experiments.mnist --sweep``.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from experiments.common.records import Records
from experiments.images.digits import N_CLASSES, Digits
from experiments.mnist.mlp import NETS, SIZES, init_mlp
from experiments.mnist.training import Learner, chunks, evaluate, train_steps


class Grid(NamedTuple):
    """The settings of the sweep, besides the images."""

    init_stds: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
    learning_rates: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
    steps: int = 3_000
    every: int = 250  # steps from one movement of the progress bar to the next
    seed: int = 0


def write_cells(
    records: Records, grid: Grid, net: str, accuracy: np.ndarray, loss: np.ndarray
) -> None:
    """Writes a JSON line for every point of the grid."""
    for i, std in enumerate(grid.init_stds):
        for j, rate in enumerate(grid.learning_rates):
            records.write(
                "cell",
                net=net,
                init_std=std,
                learning_rate=rate,
                test_accuracy=float(accuracy[i, j]),
                train_loss=float(loss[i, j]),
            )


def train_all(grid: Grid, digits: Digits, net: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns test accuracy and training loss after the last step: two arrays ``[stds, rates]``.

    The networks train side by side under ``vmap``, on the same batches, from the same Gaussian
    draws. A network whose loss is not finite counts as chance.
    """
    pairs = np.array(np.meshgrid(grid.init_stds, grid.learning_rates, indexing="ij"), np.float32)
    stds, rates = jnp.asarray(pairs.reshape(2, -1))
    init_key, data_key = jax.random.split(jax.random.key(grid.seed))
    init = functools.partial(init_mlp, init_key, SIZES, batch_norm=NETS[net])
    learners = Learner(*jax.jit(jax.vmap(init))(stds))
    train_images, train_labels, test_images, test_labels = map(jnp.asarray, digits)
    loss = jnp.full(stds.shape, jnp.nan)
    with tqdm(total=grid.steps, desc=f"{net:>10}", unit=" steps") as bar:
        for first, steps in chunks(grid.steps, grid.every):
            learners, loss = train_grid(
                learners, rates, jnp.int32(first), data_key, train_images, train_labels, steps
            )
            loss.block_until_ready()  # else the bar would count steps that are only queued
            bar.update(steps)
    accuracy = evaluate_grid(learners, test_images, test_labels)
    accuracy, loss = (np.reshape(a, pairs.shape[1:]) for a in (accuracy, loss))
    return np.where(np.isfinite(loss), accuracy, 1 / N_CLASSES), loss


@functools.partial(jax.jit, static_argnames="steps", donate_argnames="learners")
def train_grid(
    learners: Learner,
    rates: jax.Array,
    first: jax.Array,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    steps: int,
) -> tuple[Learner, jax.Array]:
    """Runs ``train_steps`` for many learners and rates at once; returns mean losses, too."""
    return jax.vmap(lambda one, rate: train_steps(one, rate, first, key, images, labels, steps))(
        learners, rates
    )


@jax.jit
def evaluate_grid(learners: Learner, images: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns every learner's test accuracy; one after the other, which needs less memory."""
    return jax.lax.map(lambda one: evaluate(one, images, labels)[0], learners)
