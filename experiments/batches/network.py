"""Makes the network, with each normalisation in its slot."""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import linen as nn

import jbn
import jbn.linen
from experiments.batches.cases import STEP, Case, Config
from experiments.images.photos import N_CLASSES
from experiments.nets.convolution import matmul_conv
from experiments.nets.norms import ScaleAndBias, by_image
from experiments.nets.resnet import ResNet
from jbn import renorm

GROUP_SIZE = 8  # channels in a group of Group Normalization


def network(config: Config, case: Case) -> ResNet:
    """Makes the network of a case. Images come in whole steps, or in parts for ``"batch"``."""
    moving = jbn.ema(config.decay, debias=True)
    makers = {
        "none": by_image(ScaleAndBias),
        "group": by_image(nn.GroupNorm, num_groups=None, group_size=GROUP_SIZE),
        "layer": by_image(nn.LayerNorm),
        "batch": functools.partial(jbn.linen.BatchNorm, update=moving),
        "synchronised": functools.partial(jbn.linen.BatchNorm, update=moving),
        "ghost": functools.partial(jbn.linen.BatchNorm, update=moving, groups=STEP // case.part),
        "renorm": functools.partial(
            jbn.linen.BatchRenorm, update=moving, groups=STEP // case.part, **limits(config.steps)
        ),
    }
    return ResNet(
        widths=config.widths,
        blocks=(1,) * len(config.widths),
        stem_stride=2,
        n_classes=N_CLASSES,
        norm=makers[case.norm],
        conv=functools.partial(
            nn.Conv, kernel_init=nn.initializers.he_normal(), conv_general_dilated=matmul_conv
        ),
    )


def limits(steps: int) -> dict[str, Any]:
    """Returns the schedule of Batch Renormalization (Ioffe 2017, section 4), made shorter.

    The paper trains by plain Batch Normalization for 5,000 steps; d_max reaches 5 at 25,000 and
    r_max 3 at 40,000. Here half of the run takes the place of 40,000.
    """
    plain, d_end, r_end = (at / 40_000 * steps / 2 for at in (5e3, 25e3, 40e3))
    return {
        "r_max": renorm.piecewise_linear((plain, r_end), (1, 3)),
        "d_max": renorm.piecewise_linear((plain, d_end), (0, 5)),
    }


def logits_and_stats(
    net: ResNet, case: Case, variables: Any, images: jax.Array
) -> tuple[jax.Array, Any]:
    """Applies the network to a step, as in training; returns logits and new running statistics.

    With ``"batch"`` each part goes through the network by itself, as on a device of its own, and
    updates the running statistics of its own; their mean over the parts goes on.
    """

    def one(images: jax.Array) -> tuple[jax.Array, Any]:
        logits, new = net.apply(variables, images, True, mutable=["batch_stats"])
        return logits, new.get("batch_stats", {})

    if case.norm != "batch":
        return one(images)
    logits, stats = jax.vmap(one)(images.reshape(-1, case.part, *images.shape[1:]))
    mean = jax.tree.map(lambda each: each.mean(0).astype(each.dtype), stats)
    return logits.reshape(-1, logits.shape[-1]), mean
