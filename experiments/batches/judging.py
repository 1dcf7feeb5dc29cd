"""Judges a trained network, by its running statistics and by the statistics of test parts."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from experiments.batches.cases import BY_BATCH, Case, Config
from experiments.batches.network import logits_and_stats, network
from experiments.batches.order import image_order
from experiments.nets.inputs import as_input

TEST_SEED = 12_345  # of the choice and order of test images: the same in every run


@functools.partial(jax.jit, static_argnames=("config", "norm", "part"))
def hits(
    config: Config, norm: str, part: int, variables: Any, steps: tuple[Array, Array]
) -> tuple[Array, Array]:
    """Computes the fractions of images that are right: by running statistics, and as in training.

    ``steps``: images ``[steps, STEP, H, W, 3]`` and labels ``[steps, STEP]``.
    """
    case = Case(norm, part, "iid", 0)
    net = network(config, case)

    def one_step(step: tuple[Array, Array]) -> tuple[Array, Array]:
        images, labels = as_input(step[0]), step[1]
        running = jnp.argmax(jnp.asarray(net.apply(variables, images, False)), -1) == labels
        if norm not in BY_BATCH:
            return running, running
        logits, _ = logits_and_stats(net, case, variables, images)
        return running, logits.argmax(-1) == labels

    running, training = lax.map(one_step, steps)
    return jnp.mean(running), jnp.mean(training)


def measure(
    config: Config, case: Case, variables: Any, images: np.ndarray, labels: np.ndarray
) -> dict[str, float]:
    """Measures accuracy on test images, which come in parts and orders like those of training."""
    rows = image_order(labels, config.judged, case.order, TEST_SEED)
    inference, training = hits(
        config._replace(orders=(), seeds=()), case.norm, case.part, variables,
        (images[rows], labels[rows]),
    )  # fmt: skip
    return {"inference_accuracy": float(inference), "training_accuracy": float(training)}
