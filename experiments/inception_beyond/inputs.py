"""Chooses the images and the network that `experiments.inception_beyond` measures."""

from __future__ import annotations

import argparse
from typing import Any

import jax
import jax.numpy as jnp

from experiments.images import data
from experiments.inception import programs
from experiments.inception.recipes import SCALES, TABLE, Scale, network
from experiments.inception.runs import Options, Sets
from experiments.inception_beyond import depth, ensemble


def some_images(images: data.ImageSet, scale: Scale, n: int) -> dict[str, jax.Array]:
    """Returns a batch of n, or of all images, cropped and mirrored as in training."""
    batches = data.train_batches(
        images, batch=min(n, len(images)), size=scale.size, seed=0, crop=scale.crop
    )
    try:
        return jax.tree.map(jnp.asarray, next(batches))
    finally:
        batches.close()


def chosen_network(args: argparse.Namespace, sets: Sets) -> tuple[Any, Any]:
    """Returns the network of a run, or BN-x5 before training, with its variables."""
    n_classes = len(sets.train.classes)
    if args.run:
        member = ensemble.restore(args.out / args.run, args.dataset, n_classes, 1)
        slots = programs.network_slots(member.run.scale, n_classes, member.options)
        net = network(member.run.recipe, member.run.scale, **slots)
        stats = member.stats["moving averages"]
        return net, {"params": member.params, "batch_stats": stats}
    scale = SCALES[args.dataset]
    slots = programs.network_slots(scale, n_classes, Options())
    net = network(TABLE["BN-x5"], scale, **slots)
    image = jnp.zeros((1, scale.size, scale.size, 3))
    start = depth.quickly(lambda key: net.init(key, image, train=False))
    return net, start(jax.random.key(0))


def middle(net: Any) -> tuple[str, ...]:
    """Returns the unit halfway through the network."""
    path = depth.longest_path(net)
    return path[len(path) // 2]
