"""A small network over the core, over linen and over nnx, in the form that training steps take.

    x -> dense -> BN -> relu -> dense -> BN -> relu -> dense

The functions in `BUILD` return (params, stats, loss_fn). The loss has the form that
`jbn.training.make_train_step` takes, and leaves out masked examples.
"""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx

import jbn
import jbn.linen
import jbn.nnx
from jbn.training import Mean

SIZES = (6, 8, 5, 3)  # of the input, the hidden layers and the classes
UPDATE = jbn.ema(0.9, unbiased=True)  # with Bessel's factor, so that the count matters


def batch(seed, n, dtype):
    """Makes n examples; about half of the second quarter and all of the third are masked."""
    rng = np.random.default_rng(seed)
    kept = np.array([1.0, 0.5, 0.0, 0.9])[np.arange(n) * 4 // n]
    return {
        "x": (rng.standard_normal((n, SIZES[0])) * 2 + 3).astype(dtype),
        "y": rng.integers(0, SIZES[-1], n),
        "mask": (rng.random(n) < kept) | (np.arange(n) < 2),
    }


def masked_loss(logits, batch):
    """Returns (loss, metrics), cross-entropy and accuracy over examples that are not masked."""
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])
    mask, hits = batch["mask"], logits.argmax(-1) == batch["y"]
    loss = Mean(jnp.where(mask, losses, 0).sum(), mask.sum())
    return loss, {"accuracy": Mean((hits & mask).sum(), mask.sum())}


def core(axis_name, dtype, update=UPDATE, axis_index_groups=None):
    keys = jax.random.split(jax.random.key(0), 3)
    pairs = list(itertools.pairwise(SIZES))
    params = {
        "kernels": [jax.random.normal(k, p, dtype) * 0.5 for k, p in zip(keys, pairs, strict=True)],
        "norms": [jbn.init_params(n, dtype) for n in SIZES[1:-1]],
    }

    def loss_fn(params, stats, batch):
        x, new = batch["x"], []
        for w, norm, old in zip(params["kernels"][:-1], params["norms"], stats, strict=True):
            x, updated = jbn.batch_norm(
                x @ w,
                norm,
                old,
                mask=batch["mask"][:, None],
                axis_name=axis_name,
                axis_index_groups=axis_index_groups,
                update=update,
            )
            x = jax.nn.relu(x)
            new.append(updated)
        loss, metrics = masked_loss(x @ params["kernels"][-1], batch)
        return loss, new, metrics

    return params, [jbn.init_stats(n, dtype) for n in SIZES[1:-1]], loss_fn


class LinenNet(nn.Module):
    axis_name: str | None
    dtype: jnp.dtype

    @nn.compact
    def __call__(self, x, mask):
        for features in SIZES[1:-1]:
            x = nn.Dense(features, use_bias=False, param_dtype=self.dtype)(x)
            x = jbn.linen.BatchNorm(
                use_running_average=False,
                param_dtype=self.dtype,
                force_float32_reductions=False,
                axis_name=self.axis_name,
                update=UPDATE,
            )(x, mask=mask[:, None])
            x = nn.relu(x)
        return nn.Dense(SIZES[-1], param_dtype=self.dtype)(x)


def linen(axis_name, dtype):
    net = LinenNet(axis_name, dtype)
    example = batch(1, 8, dtype)
    variables = jax.jit(net.init)(jax.random.key(2), example["x"], example["mask"])

    def loss_fn(params, stats, batch):
        logits, updates = net.apply(
            {"params": params, "batch_stats": stats},
            batch["x"],
            batch["mask"],
            mutable=["batch_stats"],
        )
        loss, metrics = masked_loss(logits, batch)
        return loss, updates["batch_stats"], metrics

    return variables["params"], variables["batch_stats"], loss_fn


class NnxNet(nnx.Module):
    def __init__(self, axis_name, dtype, rngs):
        pairs = list(itertools.pairwise(SIZES))
        self.dense = nnx.List(
            nnx.Linear(*pair, use_bias=False, param_dtype=dtype, rngs=rngs) for pair in pairs
        )
        self.norms = nnx.List(
            jbn.nnx.BatchNorm(n, param_dtype=dtype, axis_name=axis_name, momentum=0.9, rngs=rngs)
            for n in SIZES[1:-1]
        )

    def __call__(self, x, mask):
        for dense, norm in zip(self.dense[:-1], self.norms, strict=True):
            x = nnx.relu(norm(dense(x), mask=mask[:, None]))
        return self.dense[-1](x)


def nnx_(axis_name, dtype):
    net = NnxNet(axis_name, dtype, nnx.Rngs(0))
    graphdef, params, stats = nnx.split(net, nnx.Param, nnx.BatchStat)
    stats = jax.tree.map(lambda v: v.astype(dtype), stats)  # nnx makes them float32

    def loss_fn(params, stats, batch):
        net = nnx.merge(graphdef, params, stats)
        loss, metrics = masked_loss(net(batch["x"], batch["mask"]), batch)
        return loss, nnx.state(net, nnx.BatchStat), metrics

    return params, stats, loss_fn


BUILD = {"core": core, "linen": linen, "nnx": nnx_}
