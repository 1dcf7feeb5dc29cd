"""Recipes of the networks in the paper's comparison, and of their training.

A recipe is one curve of the paper's Figure 2, or one remark of its text. A scale is a data set with
the size of the network and the length of the training that suit it. A run depends on its recipe,
its scale and its seed, and on nothing else.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import jbn.linen
import jbn.training
from experiments.nets import bn_inception

MOMENTUM = 0.9
# The learning rate decays to this share during the steps of the baseline: by 4 % every 8 epochs, as
# in GoogLeNet (arXiv 1409.4842, section 6), over the 31 million steps of Inception.
FINAL_SHARE = 1 / 50
SPEED = 6  # of the decay in the BN-x runs (section 4.2.1)
BAND = (0.1, 0.3, 1, 3, 10, 30, 100, 300)  # multiples of the baseline's rate


class Recipe(NamedTuple):
    """One network and its training (sections 4.2.1 and 4.2.2)."""

    batch_norm: bool = True
    sigmoid: bool = False
    rate: float = 1.0  # the first rate, as a multiple of the baseline's
    decay_speed: float = 1.0  # of the rate, as a multiple of the baseline's
    weight_decay: float = 1.0  # as a multiple of the baseline's
    dropout: float = 0.4
    lrn: bool = True  # local response normalisation
    shuffle: str = "fixed-shards"  # the examples of a shard keep their order
    distortion: str = "full"  # of the colours
    init: float = 1.0  # standard deviation of the initial kernels, as a multiple of He's
    share: float = 1.0  # of the baseline's steps that a run takes

    def of_network(self) -> Recipe:
        """Returns the recipe with defaults for all that its network does not depend on."""
        names = "batch_norm", "sigmoid", "dropout", "lrn", "init"
        return Recipe(**{name: getattr(self, name) for name in names})


# Section 4.2.1: a higher rate that decays faster, no Dropout, a fifth of the weight decay, no local
# response normalisation, examples shuffled within their shard, less distortion.
_MODIFIED = Recipe(
    decay_speed=SPEED,
    weight_decay=1 / 5,
    dropout=0.0,
    lrn=False,
    shuffle="within-shard",
    distortion="reduced",
    share=1 / 5,
)

TABLE = {
    "Inception": Recipe(batch_norm=False),
    "BN-Baseline": Recipe(),
    "BN-x5": _MODIFIED._replace(rate=5.0),
    "BN-x30": _MODIFIED._replace(rate=30.0),
    "BN-x5-Sigmoid": _MODIFIED._replace(rate=5.0, sigmoid=True),
    "Inception-Sigmoid": Recipe(batch_norm=False, sigmoid=True, share=1 / 5),
    "Inception-x5": Recipe(batch_norm=False, rate=5.0, share=1 / 5),
}

# BN-x5 with one change each, to measure the effect of each of the paper's modifications.
REMARKS = {
    "BN-x5, Dropout 10 %": TABLE["BN-x5"]._replace(dropout=0.1),
    "BN-x5, Dropout 40 %": TABLE["BN-x5"]._replace(dropout=0.4),
    "BN-x5, weight decay x5": TABLE["BN-x5"]._replace(weight_decay=1.0),
    "BN-x5, no weight decay": TABLE["BN-x5"]._replace(weight_decay=0.0),
    "BN-x5, slow rate decay": TABLE["BN-x5"]._replace(decay_speed=1.0, share=1.0),
    "BN-x5, LRN": TABLE["BN-x5"]._replace(lrn=True),
    "BN-x5, fixed shards": TABLE["BN-x5"]._replace(shuffle="fixed-shards"),
    "BN-x5, full distortion": TABLE["BN-x5"]._replace(distortion="full"),
}

# Kernels by LeCun's initialiser, Flax's default, which are 0.7 times as large as He's.
INITS = {
    f"{name}, LeCun init": TABLE[name]._replace(init=math.sqrt(1 / 2))
    for name in ("Inception", "BN-x5")
}

# Section 4.2.3: members of the ensemble, which are variants of BN-x30.
ENSEMBLE = {
    "BN-x30, larger init": TABLE["BN-x30"]._replace(init=2.0),
    "BN-x30, Dropout 5 %": TABLE["BN-x30"]._replace(dropout=0.05),
    "BN-x30, Dropout 10 %": TABLE["BN-x30"]._replace(dropout=0.1),
}


def band(recipe: Recipe, share: float = 1 / 20) -> list[Recipe]:
    """Lists a recipe at rates over 3.5 decades, each for a short while and without decay."""
    return [recipe._replace(rate=rate, decay_speed=0.0, share=share) for rate in BAND]


RATES = {
    f"{name} at x{recipe.rate:g}": recipe
    for name, base in (("Inception", TABLE["Inception"]), ("BN", TABLE["BN-Baseline"]))
    for recipe in band(base)
}

RECIPES = TABLE | REMARKS | INITS | ENSEMBLE | RATES


class Scale(NamedTuple):
    """A data set, and the network and the training that suit it."""

    name: str
    net: Callable[..., bn_inception.Inception]
    width: float  # share of the channels of the paper's table
    size: int  # pixels
    crop: str  # of training images
    rate: float  # of the baseline
    steps: int  # of the baseline
    weight_decay: float
    shards: int
    batch: int = 32
    modules: tuple[str, ...] = ()  # rows of the paper's table; () is all of them
    repeat: int = 1  # of every module that keeps the resolution
    evaluations: int = 50  # in the baseline's steps; shorter runs have twice as many a step
    eval_batch: int = 512
    population: int = 10_000  # training images for the exact statistics

    def numbers(self) -> dict[str, Any]:
        """Returns the fields that a network depends on and an option may change."""
        names = "width", "size", "batch", "modules", "repeat"
        return {name: getattr(self, name) for name in names}

    def of_network(self) -> Scale:
        """Returns the scale with constants for all that its network does not depend on."""
        rest = {"crop": "", "rate": 0.0, "steps": 1, "weight_decay": 0.0, "shards": 1}
        return Scale("", self.net, **self.numbers(), **rest)


def _he(std: float) -> Callable[..., jax.Array]:
    """Returns He's initialiser for ReLU (arXiv 1502.01852), times a factor."""
    return nn.initializers.variance_scaling(2.0 * std**2, "fan_in", "truncated_normal")


SCALES = {
    "cifar10": Scale(
        "cifar10", bn_inception.small_inception, width=1 / 8, size=32, crop="shift", rate=0.03,
        steps=20_000, weight_decay=2e-4, shards=200, evaluations=40,
    ),
    # The paper's scale: 31 million steps of 32 images are 775 epochs.
    "imagenet": Scale(
        "imagenet", bn_inception.wide_inception, width=1, size=224, crop="resized", rate=0.0015,
        steps=31_000_000, weight_decay=4e-5, shards=1024, evaluations=200, eval_batch=64,
        population=100_000,
    ),
    # Takes seconds on made-up images, to test that everything runs.
    "smoke": Scale(
        "smoke", bn_inception.small_inception, width=1 / 32, size=32, crop="shift", rate=0.01,
        steps=40, weight_decay=2e-4, shards=4, batch=16, modules=("3c",), evaluations=4,
        eval_batch=32, population=64,
    ),
}  # fmt: skip


def network(recipe: Recipe, scale: Scale, **slots: Any) -> bn_inception.Inception:
    """Makes the recipe's network at this scale.

    Args:
      recipe: which layers the network has.
      scale: how large the network is.
      **slots: as for `bn_inception.Inception`, but for the norm. `groups` goes to the Batch
        Normalization layers, all else to the network.
    """
    groups = slots.pop("groups", None)
    norm = functools.partial(jbn.linen.BatchNorm, update=jbn.ema(0.99, debias=True), groups=groups)
    return scale.net(
        width=scale.width,
        rows=bn_inception.rows(*scale.modules, width=scale.width, repeat=scale.repeat),
        norm=norm if recipe.batch_norm else None,
        fused=recipe.batch_norm,
        activation=nn.sigmoid if recipe.sigmoid else nn.relu,
        lrn=recipe.lrn,
        dropout=recipe.dropout,
        kernel_init=_he(recipe.init),
        **slots,
    )


def hyperparameters(recipe: Recipe, scale: Scale, rate: float) -> dict[str, float]:
    """Returns the arguments of `optimizer`; `rate` is the baseline's first rate."""
    return {
        "rate": rate * recipe.rate,
        "decay": recipe.decay_speed * math.log(1 / FINAL_SHARE) / scale.steps,
        "weight_decay": scale.weight_decay * recipe.weight_decay,
    }


def optimizer(rate: Any, decay: Any, weight_decay: Any) -> optax.GradientTransformation:
    """Makes SGD with momentum and weight decay, at the rate ``rate * exp(-decay * step)``.

    The hyperparameters are arrays in its state. A compiled step reads them there, so one program
    serves all rates.
    """

    def make(rate: Any, decay: Any, weight_decay: Any) -> optax.GradientTransformation:
        def schedule(step: Any) -> jax.Array:
            return rate * jnp.exp(-decay * step.astype(jnp.float32))

        return optax.chain(
            optax.add_decayed_weights(weight_decay, mask=jbn.training.decay_mask),
            optax.sgd(schedule, momentum=MOMENTUM),
        )

    return optax.inject_hyperparams(make)(rate=rate, decay=decay, weight_decay=weight_decay)


def n_steps(recipe: Recipe, scale: Scale) -> int:
    """Returns the number of steps of a run of this recipe."""
    return max(1, round(recipe.share * scale.steps))
