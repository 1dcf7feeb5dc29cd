"""Trains a network by SGD at a constant rate, and measures its test accuracy on the way."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import Array, lax

import jbn.training

SETTLING = 100  # batches


class Data(NamedTuple):
    """Images and labels in two sets that share no image."""

    images: np.ndarray
    labels: np.ndarray
    test_images: np.ndarray
    test_labels: np.ndarray


class Task(NamedTuple):
    """A network to train, and how. Static."""

    network: Callable[[str], nn.Module]  # of a name in `networks.LAYERS`
    prepare: Callable[[Array], Array]  # images -> input
    batch: int
    steps: int
    chunk: int  # steps from one measurement to the next
    tuning: int  # steps of the runs that choose a rate
    rates: tuple[float, ...]
    momentum: float | None = None


class Programs(NamedTuple):
    """The compiled functions of one network."""

    init: Callable[..., Any]  # (key, rate, one image) -> state
    steps: Callable[..., Any]  # (state, images, labels, rows [steps, batch]) -> (state, loss)
    accuracy: Callable[..., Any]  # (state, images [k, n, ...], labels [k, n]) -> []
    settle: Callable[..., Any]  # (state, images, rows) -> state with new statistics


class Run(NamedTuple):
    """The results of one training."""

    accuracies: list[float]  # on the test set, by running statistics, after every chunk of steps
    settled: float  # the last one by statistics of batches that all saw the final parameters
    loss: float  # mean over the last chunk


@functools.cache
def programs(task: Task, layer: str) -> Programs:
    """Makes the functions. The rate is in the state, so that one program serves all rates."""
    net = task.network(layer)
    optimizer = optax.inject_hyperparams(functools.partial(optax.sgd, momentum=task.momentum))

    def loss_fn(params: Any, stats: Any, batch: tuple[Array, Array]) -> Any:
        variables = {"params": params, "batch_stats": stats}
        logits, new = net.apply(variables, task.prepare(batch[0]), True, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch[1])
        return losses.mean(), new.get("batch_stats", {}), {}

    step = jbn.training.make_train_step(loss_fn, optimizer(learning_rate=0.0))

    def init(key: Array, rate: Array, image: Array) -> Any:
        variables = net.init(key, task.prepare(image[None]), train=False)
        state = variables["params"], variables.get("batch_stats", {})
        return jbn.training.init(*state, optimizer(learning_rate=rate))

    def steps(state: Any, images: Array, labels: Array, rows: Array) -> Any:
        take = lambda state, row: step(state, (images[row], labels[row]))  # noqa: E731
        state, metrics = lax.scan(take, state, rows)
        return state, metrics["loss"].mean()

    def accuracy(state: Any, images: Array, labels: Array) -> Array:
        variables = {"params": state.params, "batch_stats": state.stats}

        def right_of(part: tuple[Array, Array]) -> Array:
            logits: Any = net.apply(variables, task.prepare(part[0]), False)
            return logits.argmax(-1) == part[1]

        right = lax.map(right_of, (images, labels))
        return right.mean(dtype=jnp.float32)

    def settle(state: Any, images: Array, rows: Array) -> Any:
        def update(stats: Any, row: Array) -> Any:
            variables = {"params": state.params, "batch_stats": stats}
            _, new = net.apply(variables, task.prepare(images[row]), True, mutable=["batch_stats"])
            return new.get("batch_stats", {}), None

        # Debiased averages of count 0 start anew.
        start = jax.tree.map(jnp.zeros_like, state.stats)
        return state._replace(stats=lax.scan(update, start, rows)[0])

    return Programs(*map(jax.jit, (init, steps, accuracy, settle)))


def order(among: np.ndarray, task: Task, steps: int, seed: int) -> np.ndarray:
    """Returns the images of every step, ``[steps, batch]``: a new shuffle every epoch."""
    draw, epoch = np.random.default_rng(seed), len(among) // task.batch
    epochs = [draw.permutation(among)[: epoch * task.batch] for _ in range(steps // epoch + 1)]
    return np.concatenate(epochs).reshape(-1, task.batch)[:steps]


def train(
    task: Task, layer: str, rate: float, seed: int, data: Data, steps: int, among: np.ndarray
) -> Run:
    """Trains a network and measures it.

    `among`: the images to train on, as indices. A subset compiles nothing new.
    """
    run, rows = programs(task, layer), order(among, task, steps, seed)
    state = run.init(jax.random.key(seed), rate, data.images[0])
    images, labels = jnp.asarray(data.images), jnp.asarray(data.labels)
    tests = parts(data.test_images), parts(data.test_labels)
    accuracies, loss = [], jnp.nan
    for first in range(0, steps, task.chunk):
        state, loss = run.steps(state, images, labels, rows[first : first + task.chunk])
        accuracies.append(float(run.accuracy(state, *tests)))
    settled = run.settle(state, images, order(among, task, SETTLING, seed + 1))
    return Run(accuracies, float(run.accuracy(settled, *tests)), float(loss))


def parts(values: np.ndarray, size: int = 500) -> np.ndarray:
    """Divides values into parts that fit into memory, ``[k, size, ...]``; drops what is left."""
    size = min(size, len(values))
    return values[: len(values) // size * size].reshape(-1, size, *values.shape[1:])
