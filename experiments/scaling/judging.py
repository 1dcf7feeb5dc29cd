"""Judges a trained network, by running statistics and by batch statistics."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

from experiments.images.photos import Photos
from experiments.nets.inputs import as_input
from experiments.scaling.cases import Case, Config, sharing
from experiments.scaling.training import image_order, network

JUDGED_AT_ONCE = 512  # images


class Judgement(NamedTuple):
    """The results of a network on a set of images."""

    loss: Array  # [] nats, mean over the images
    accuracy: Array  # []
    predicted: Array  # [N] int32, the class of each image


@functools.partial(jax.jit, static_argnames=("config", "shared_by"))
def judge(
    config: Config, variables: Any, images: Array, labels: Array, shared_by: int | None = None
) -> Judgement:
    """Computes loss and accuracy by the running statistics, or by those of ``shared_by`` images.

    The latter are the statistics of a training step whose devices share them over so many images.
    Images that do not fill a group are left out.
    """
    net, size = network(config), shared_by or 1

    def one_group(group: tuple[Array, Array]) -> tuple[Array, Array]:
        pixels, truth = group
        train = shared_by is not None
        logits, _ = net.apply(variables, as_input(pixels), train, mutable=["batch_stats"])
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, truth)
        return losses, logits.argmax(-1).astype(jnp.int32)

    n = len(images) // size * size
    groups = images[:n].reshape(-1, size, *images.shape[1:]), labels[:n].reshape(-1, size)
    losses, predicted = lax.map(one_group, groups, batch_size=max(1, JUDGED_AT_ONCE // size))
    predicted = predicted.reshape(-1)
    return Judgement(losses.mean(), jnp.mean(predicted == labels[:n]), predicted)


def spread_out(n_images: int, wanted: int) -> np.ndarray:
    """Returns the indices of ``wanted`` images, evenly from a set that may be sorted by class."""
    return np.arange(n_images) if n_images <= wanted else np.arange(wanted) * n_images // wanted


def measure(config: Config, photos: Photos, case: Case, variables: Any) -> dict[str, Any]:
    """Measures accuracy on both sets; on the training images by batch and by running statistics.

    It also measures how often these two agree on the class of a training image.
    """
    shared_by = config.per_device * sharing(case.statistics, case.devices)
    seen = image_order(len(photos.train_images), config.images, case.seed)[: config.judged]
    tested = spread_out(len(photos.test_images), config.judged)
    train_set = photos.train_images[seen], photos.train_labels[seen]
    test_set = photos.test_images[tested], photos.test_labels[tested]
    sets = {
        "train_by_batch": (*train_set, shared_by),
        "train_by_running": (*train_set, None),
        "test": (*test_set, None),
    }
    judged = {name: judge(config, variables, *map(jnp.asarray, (images, labels)), by)
              for name, (images, labels, by) in sets.items()}  # fmt: skip
    one_way = judged["train_by_batch"].predicted
    agreement = jnp.mean(one_way == judged["train_by_running"].predicted[: len(one_way)])
    results = {"shared_by": shared_by, "agreement": float(agreement)}
    for name, judgement in judged.items():
        results |= {f"{name}_accuracy": float(judgement.accuracy)}
        results |= {f"{name}_loss": float(judgement.loss)}
    return results
