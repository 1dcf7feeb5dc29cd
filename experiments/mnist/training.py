"""Trains the networks of the digit experiments: hundreds of SGD steps in one compiled call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from experiments.mnist.mlp import MLP, Stats, apply_test, apply_train

BATCH = 60  # images a step


class Learner(NamedTuple):
    """The input and the output of a training step. Plain SGD has no state of its own."""

    mlp: MLP
    stats: Stats


def batch_order(key: jax.Array, n_images: int, first: jax.Array, steps: int) -> jax.Array:
    """Returns the images of ``steps`` batches from number ``first`` on: ``[steps, BATCH]``.

    Every epoch is a new shuffle and uses no image twice. The order depends on the key and the step
    alone, so two networks with the same key train on the same batches.
    """
    if n_images < BATCH:
        raise ValueError(f"{n_images} training images. Expected at least {BATCH}, one batch.")
    per_epoch = n_images // BATCH
    first_epoch = first // per_epoch
    epochs = first_epoch + jnp.arange(steps // per_epoch + 2)

    def shuffle(epoch: jax.Array) -> jax.Array:
        images = jax.random.permutation(jax.random.fold_in(key, epoch), n_images)
        return images[: per_epoch * BATCH].reshape(per_epoch, BATCH)

    batches = jax.vmap(shuffle)(epochs).reshape(-1, BATCH)
    return jax.lax.dynamic_slice_in_dim(batches, first - first_epoch * per_epoch, steps)


def loss_fn(
    mlp: MLP, stats: Stats, images: jax.Array, labels: jax.Array
) -> tuple[jax.Array, Stats]:
    """Returns the mean softmax cross-entropy (nats), and the updated running statistics."""
    logits, stats = apply_train(mlp, stats, images.astype(jnp.float32))
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean(), stats


def train_steps(
    learner: Learner,
    learning_rate: jax.Array,
    first: jax.Array,
    key: jax.Array,
    images: jax.Array,
    labels: jax.Array,
    steps: int,
) -> tuple[Learner, jax.Array]:
    """Takes ``steps`` steps of SGD from number ``first`` on; returns the mean loss, too.

    Args:
      learner: the network and its running statistics.
      learning_rate: ``[]``.
      first: ``[]``, int32, counted from 0.
      key: decides the order of the images.
      images: ``[N, pixels]``, bool, a quarter of float32's memory; cast batch by batch.
      labels: ``[N]``, int32.
      steps: how many; a Python integer.
    """
    optimizer = optax.sgd(learning_rate)

    def step(carry: Any, batch: jax.Array) -> tuple[Any, jax.Array]:
        (mlp, stats), opt_state = carry
        (loss, stats), grads = jax.value_and_grad(loss_fn, has_aux=True)(
            mlp, stats, images[batch], labels[batch]
        )
        updates, opt_state = optimizer.update(grads, opt_state, mlp)
        mlp: Any = optax.apply_updates(mlp, updates)
        return (Learner(mlp, stats), opt_state), loss

    params: Any = learner.mlp  # Optax's declared type of trees leaves out NamedTuples
    carry = learner, optimizer.init(params)
    batches = batch_order(key, len(images), first, steps)
    (learner, _), losses = jax.lax.scan(step, carry, batches)
    return learner, losses.mean()


# The learner's buffers are donated: the caller must use the returned learner.
train_chunk = jax.jit(train_steps, static_argnames="steps", donate_argnames="learner")


@jax.jit
def evaluate(learner: Learner, images: jax.Array, labels: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns accuracy ``[]``, by running statistics, and last sigmoids' inputs ``[N, units]``."""
    logits, inputs = apply_test(learner.mlp, learner.stats, images.astype(jnp.float32))
    return (logits.argmax(-1) == labels).mean(dtype=jnp.float32), inputs


def chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    """Yields ``(first, steps)`` of the consecutive chunks that make up ``total`` steps."""
    for first in range(0, total, size):
        yield first, min(size, total - first)
