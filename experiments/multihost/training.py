"""Trains a network for digits on all devices of a mesh, of one process or several."""

from __future__ import annotations

import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
import jbn.training
from experiments.images.digits import bundled_digits

AXIS = "batch"
BATCH = 240  # images a step, over all devices
SIZES = (784, 64, 32, 10)
MODES = ("jit", "shard_map")  # two ways to spread a step over devices


def init(key: jax.Array) -> tuple[Any, Any]:
    """Makes parameters and running statistics."""
    keys = jax.random.split(key, len(SIZES) - 1)
    pairs = zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    kernels = [jax.random.normal(k, (n, m)) / n**0.5 for k, n, m in pairs]
    hidden = SIZES[1:-1]
    params = {"kernels": kernels, "norms": [jbn.init_params(n) for n in hidden]}
    return params, [jbn.init_stats(n) for n in hidden]


def make_loss(axis_name: str | None) -> jbn.training.LossFn:
    """Makes a loss function: cross-entropy of dense layers; `axis_name` is for shard_map."""

    def loss_fn(params: Any, stats: Any, batch: Any) -> tuple[Any, Any, Any]:
        x, new = batch["images"].astype(jnp.float32), []
        for kernel, norm, old in zip(params["kernels"], params["norms"], stats, strict=False):
            x, updated = jbn.batch_norm(x @ kernel, norm, old, axis_name=axis_name)
            x = jax.nn.relu(x)
            new.append(updated)
        logits = x @ params["kernels"][-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        accuracy = (logits.argmax(-1) == batch["labels"]).mean(dtype=jnp.float32)
        return losses.mean(), new, {"accuracy": accuracy}

    return loss_fn


def spread(batch: Any, mesh: Mesh) -> Any:
    """Makes global arrays over the mesh; every process provides the rows of its own devices."""
    sharding = NamedSharding(mesh, P(AXIS))

    def place(values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(place, batch)


def train(mesh: Mesh, mode: str, steps: int, *, quiet: bool = True) -> jbn.training.TrainState:
    """Returns the state after `steps` steps on all devices of the mesh."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    axis_name = AXIS if mode == "shard_map" else None
    step = jbn.training.make_train_step(
        make_loss(axis_name), optimizer, axis_name=axis_name, microbatches=2
    )
    if mode == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P())
    step = jax.jit(step, donate_argnums=0)
    everywhere = NamedSharding(mesh, P())

    def start() -> jbn.training.TrainState:
        return jbn.training.init(*init(jax.random.key(0)), optimizer)

    state = jax.jit(start, out_shardings=everywhere)()
    digits = bundled_digits()
    rng = np.random.default_rng(0)  # the same order in every process
    with jax.set_mesh(mesh):
        for i in range(steps):
            rows = rng.choice(len(digits.train_labels), BATCH, replace=False)
            batch = {"images": digits.train_images[rows], "labels": digits.train_labels[rows]}
            state, metrics = step(state, spread(batch, mesh))
            if not quiet and (i + 1) % 10 == 0:
                print(
                    f"{mode:9} step {i + 1:3}: loss {metrics['loss']:.4f}, "
                    f"accuracy {metrics['accuracy']:.3f}",
                    flush=True,
                )
    return state


def fingerprint(state: jbn.training.TrainState) -> str:
    """Hashes all numbers: equal hashes if and only if they are equal, bit for bit."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]
