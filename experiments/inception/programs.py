"""Compiles the parts of a run: a step, an evaluation, the exact statistics."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn.training
from experiments.inception.recipes import Recipe, Scale, network, optimizer
from experiments.inception.runs import Options
from experiments.nets import bn_inception, convolution
from experiments.nets.inputs import as_input

AXIS = "batch"
AUXILIARY_WEIGHT = 0.3  # of the loss of an auxiliary head, as in GoogLeNet


def cross_entropy(logits: Array, labels: Array) -> Array:
    """Returns the loss of each image, in nats."""
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


def make_loss(net: bn_inception.Inception) -> Callable[..., Any]:
    """Makes a loss function: mean cross-entropy of a batch, plus that of auxiliary heads."""

    def loss_fn(params: Any, stats: Any, batch: Any, key: Array) -> Any:
        variables, rngs = {"params": params, "batch_stats": stats}, {"dropout": key}
        x = as_input(batch["image"])
        out, new = net.apply(variables, x, train=True, mutable=["batch_stats"], rngs=rngs)
        logits, heads = out if isinstance(out, tuple) else (out, [])
        loss = cross_entropy(logits, batch["label"]).mean()
        for head in heads:
            loss += AUXILIARY_WEIGHT * cross_entropy(head, batch["label"]).mean()
        return loss, new.get("batch_stats", {}), {}

    return loss_fn


def make_judge(net: bn_inception.Inception) -> Callable[..., Any]:
    """Makes a function that sums loss and accuracies over the images that the mask keeps."""

    def judge(params: Any, stats: Any, batch: Any) -> Any:
        variables = {"params": params, "batch_stats": stats}
        logits: Any = net.apply(variables, as_input(batch["image"]), train=False)
        labels = jnp.maximum(batch["label"], 0)  # padding has none
        place = rank(logits, labels)
        values = {"loss": cross_entropy(logits, labels), "top1": place <= 1, "top5": place <= 5}
        values = {k: v.astype(jnp.float32) for k, v in values.items()}
        weights = batch["mask"].astype(jnp.float32)
        return {k: jbn.training.Mean((v * weights).sum(), weights.sum()) for k, v in values.items()}

    return judge


def rank(scores: Array, labels: Array) -> Array:
    """Returns the place of the right class among all: 1 is best; a tie gets its last place.

    ``scores: [N, n_classes]``, ``labels: [N]``; a NaN or infinity gets a place after all others.
    """
    own = jnp.take_along_axis(scores, labels[:, None], 1)
    place = (~(scores < own)).sum(1)
    return jnp.where(jnp.isfinite(own[:, 0]), place, jnp.iinfo(place.dtype).max)


class Program(NamedTuple):
    """The compiled functions of a network, and the mesh that they run on."""

    mesh: Mesh
    start: Callable[..., jbn.training.TrainState]  # (key, hyperparameters) -> state
    step: Callable[..., Any]  # (state, batch, key) -> (state, metrics)
    judge: Callable[..., Any]  # (params, stats, batch) -> metrics
    collect: Callable[..., Any]  # (params, stats, batch) -> stats, in training mode

    def place(self, batch: Any) -> Any:
        """Makes the global batch on all devices from each process' share."""
        split = NamedSharding(self.mesh, P(AXIS))
        return jax.tree.map(functools.partial(jax.make_array_from_process_local_data, split), batch)


@functools.cache
def program(recipe: Recipe, scale: Scale, n_classes: int, options: Options) -> Program:
    """Compiles the parts once for all runs with equal arguments, which `of_...` must make."""
    devices = jax.devices()[: options.devices]
    mesh = jax.make_mesh((len(devices),), (AXIS,), (AxisType.Auto,), devices=devices)
    slots = network_slots(scale, n_classes, options)
    plain = network(recipe, scale, **slots)  # ghost batches are for training
    net = network(recipe, scale, groups=n_groups(scale, options, len(devices)), **slots)
    loss_fn = make_loss(net)
    step = jbn.training.make_train_step  # the key is an argument: all seeds share a program

    def start(key: Array, hyper: dict[str, Array]) -> jbn.training.TrainState:
        image = jnp.zeros((1, scale.size, scale.size, 3))
        variables = plain.init({"params": key, "dropout": key}, image, train=options.auxiliary)
        stats = variables.get("batch_stats", {})
        return jbn.training.init(variables["params"], stats, optimizer(**hyper))

    def train_step(state: Any, batch: Any, key: Array) -> Any:
        return step(loss_fn, optimizer(0.0, 0.0, 0.0), rng=key)(state, batch)

    def collect(params: Any, stats: Any, batch: Any) -> Any:
        return loss_fn(params, stats, batch, jax.random.key(0))[1]

    everywhere = NamedSharding(mesh, P())
    return Program(
        mesh,
        jax.jit(start, out_shardings=everywhere),
        jax.jit(train_step, donate_argnums=0, out_shardings=everywhere),
        make_judge(plain),
        collect,
    )


def network_slots(scale: Scale, n_classes: int, options: Options) -> dict[str, Any]:
    """Returns the parts of a network that its recipe does not fix."""
    slots: dict[str, Any] = {"n_classes": n_classes}
    if options.auxiliary:
        names = [row.name for row in bn_inception.rows(*scale.modules, repeat=scale.repeat)]
        slots["auxiliary"] = tuple({"4a", "4d"} & {*names}) or (names[-1],)
    if options.bfloat16:
        slots["dtype"] = jnp.bfloat16
    if jax.default_backend() == "cpu" and scale.size < 64:
        slots["conv"] = convolution.CPU_CONV
    return slots


def n_groups(scale: Scale, options: Options, devices: int) -> int | None:
    """Returns how many parts of a batch are normalised separately; None: there is only one."""
    counts = {"synchronised": 1, "local": devices, "ghost": scale.batch // options.ghost_batch}
    groups = counts[options.statistics]
    return groups if groups > 1 else None
