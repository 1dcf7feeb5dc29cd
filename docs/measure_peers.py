"""What Batch Normalization does in jbn, Flax, Haiku, Equinox, PyTorch and Keras, measured.

Runs one small experiment per row and library on the CPU, and prints docs/peers.md::

    pip install -e . dm-haiku equinox keras torch
    python docs/measure_peers.py > docs/peers.md

Takes about a minute. Every layer has its library's defaults; Haiku's `decay_rate` and Equinox's
`mode` have none (or warn about it) and are 0.99 and "batch" here.
"""

import importlib.metadata
import inspect
import os
from collections.abc import Callable
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["KERAS_BACKEND"] = "jax"

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import keras
import numpy as np
import torch
from flax import nnx

import jbn

CHANNELS = 3
Array = Any
# (the last training output, the layer in inference)
Trained = tuple[Array, Callable[[Array], Array]]


# --- one function a library: trains a fresh layer on batches [N, C] ------------------------------
# `old` is the weight of the old running value (None: the library's default); `masks` is None or one
# array [N, 1] bool a batch.


def run_jbn(batches, *, old=None, masks=None) -> Trained:
    params, stats = jbn.init_params(CHANNELS), jbn.init_stats(CHANNELS)
    update = jbn.ema() if old is None else jbn.ema(old)
    for x, mask in zip(batches, masks or [None] * len(batches), strict=True):
        y, stats = jbn.batch_norm(jnp.asarray(x), params, stats, update=update, mask=mask)
    return y, lambda x: jbn.batch_norm_inference(jnp.asarray(x), params, stats)


def run_linen(batches, *, old=None, masks=None) -> Trained:
    layer = nn.BatchNorm(**({} if old is None else {"momentum": old}))
    variables = layer.init(jax.random.key(0), jnp.ones((2, CHANNELS)), use_running_average=False)
    for x, mask in zip(batches, masks or [None] * len(batches), strict=True):
        y, new = layer.apply(variables, jnp.asarray(x), False, mask=mask, mutable=["batch_stats"])
        variables = {**variables, **new}
    return y, lambda x: layer.apply(variables, jnp.asarray(x), True)


def run_nnx(batches, *, old=None, masks=None) -> Trained:
    kwargs = {} if old is None else {"momentum": old}
    layer = nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0), **kwargs)
    for x, mask in zip(batches, masks or [None] * len(batches), strict=True):
        y = layer(jnp.asarray(x), use_running_average=False, mask=mask)
    return y, lambda x: layer(jnp.asarray(x), use_running_average=True)


def run_haiku(batches, *, old=None) -> Trained:
    decay = 0.99 if old is None else old
    net = hk.without_apply_rng(
        hk.transform_with_state(lambda x, training: hk.BatchNorm(True, True, decay)(x, training))
    )
    params, state = net.init(jax.random.key(0), jnp.asarray(batches[0]), True)
    for x in batches:
        y, state = net.apply(params, state, jnp.asarray(x), True)
    return y, lambda x: net.apply(params, state, jnp.asarray(x), False)[0]


def run_equinox(batches, *, old=None) -> Trained:
    kwargs = {} if old is None else {"momentum": old}
    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(CHANNELS, "b", mode="batch", **kwargs)
    train = jax.vmap(layer, axis_name="b", in_axes=(0, None), out_axes=(0, None))
    for x in batches:
        y, state = train(jnp.asarray(x), state)
    evaluate = jax.vmap(
        lambda x: eqx.nn.inference_mode(layer)(x, state)[0], axis_name="b", in_axes=0
    )
    return y, lambda x: evaluate(jnp.asarray(x))


def to_torch(x) -> torch.Tensor:
    x = np.asarray(x)
    if x.dtype == jnp.bfloat16:
        return torch.tensor(x.astype(np.float32)).bfloat16()
    return torch.tensor(x)


def run_torch(batches, *, old=None) -> Trained:
    layer = torch.nn.BatchNorm1d(CHANNELS, **({} if old is None else {"momentum": 1 - old}))
    for x in batches:
        y = layer(to_torch(x)).detach()
    return y, lambda x: layer.eval()(to_torch(x)).detach().numpy()


def run_keras(batches, *, old=None, masks=None) -> Trained:
    layer = keras.layers.BatchNormalization(**({} if old is None else {"momentum": old}))
    layer.build((None, CHANNELS))
    for x, mask in zip(batches, masks or [None] * len(batches), strict=True):
        mask = None if mask is None else mask[:, 0]
        y = layer(jnp.asarray(x), training=True, mask=mask)
    return y, lambda x: layer(jnp.asarray(x), training=False)


RUN: dict[str, Callable[..., Trained]] = {
    "jbn": run_jbn,
    "Flax linen": run_linen,
    "Flax nnx": run_nnx,
    "Haiku": run_haiku,
    "Equinox": run_equinox,
    "PyTorch": run_torch,
    "Keras": run_keras,
}
HAS_MASK = ("jbn", "Flax linen", "Flax nnx", "Keras")


# --- the rows ------------------------------------------------------------------------------------


def batch(n=1024, mean=0.0, std=1.0, seed=0, dtype=np.float32) -> np.ndarray:
    x = np.random.default_rng(seed).normal(mean, std, (n, CHANNELS))
    return x.astype(dtype)


def inference_moments(evaluate) -> tuple[float, float]:
    """The mean and variance (plus epsilon) that inference uses, from its output at 0 and 1."""
    y = np.asarray(evaluate(np.tile(np.array([[0.0], [1.0]], np.float32), CHANNELS)), np.float64)
    slope = y[1, 0] - y[0, 0]
    return -y[0, 0] / slope, 1 / slope**2


def number(v: float) -> str:
    if not np.isfinite(v):
        return "NaN" if np.isnan(v) else "inf"
    if v == 0 or 1e-2 <= abs(v) < 1e3:
        return f"{v:.3g}"
    mantissa, exponent = f"{v:.0e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def epsilon(name) -> str:
    takes_it = {
        "jbn": jbn.batch_norm,
        "Flax linen": nn.BatchNorm.__init__,
        "Flax nnx": nnx.BatchNorm.__init__,
        "Haiku": hk.BatchNorm.__init__,
        "Equinox": eqx.nn.BatchNorm.__init__,
        "PyTorch": torch.nn.BatchNorm1d.__init__,
        "Keras": keras.layers.BatchNormalization.__init__,
    }
    parameters = inspect.signature(takes_it[name]).parameters
    return number(next(p.default for k, p in parameters.items() if k in ("epsilon", "eps")))


def mean_after(steps):
    def row(name) -> str:
        x = batch()
        x = x - x.mean(0) + 1
        return number(inference_moments(RUN[name]([x] * steps)[1])[0])

    return row


def std_after_one(name) -> str:
    x = batch()
    x = 10 * (x - x.mean(0)) / x.std(0)
    return number(inference_moments(RUN[name]([x])[1])[1] ** 0.5)


def bessel(name) -> str:
    x = np.tile(np.array([[-1.0], [-1.0], [1.0], [1.0]], np.float32), CHANNELS)
    return number(inference_moments(RUN[name]([x], old=0.0)[1])[1])


def error_at(ratio):
    def row(name) -> str:
        x = batch(8192, mean=ratio)
        exact = x.astype(np.float64)
        eps = float(epsilon(name))
        y = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + eps)
        return number(np.abs(np.asarray(RUN[name]([x])[0], np.float64) - y).max())

    return row


def masked(value):
    """The error of y at the positions that count, where the others hold `value`."""

    def row(name) -> str:
        if name not in HAS_MASK:
            return "no mask"
        x = batch(64)
        mask = np.arange(64)[:, None] < 48
        x[48:] = value
        exact = x[:48].astype(np.float64)
        y = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + float(epsilon(name)))
        got = RUN[name]([x], masks=[jnp.asarray(mask)])[0]
        return number(np.abs(np.asarray(got, np.float64)[:48] - y).max())

    return row


def masked_gradient(name) -> str:
    """Whether dx is finite everywhere with NaN under the mask, for a loss over what counts."""
    if name not in HAS_MASK:
        return "no mask"
    mask = jnp.arange(64)[:, None] < 48
    x = jnp.where(mask, jnp.asarray(batch(64)), jnp.nan)
    cotangent = jnp.asarray(batch(64, seed=1))

    def loss(x):
        if name == "Keras":
            layer = keras.layers.BatchNormalization()
            layer.build((None, CHANNELS))
            y, _ = layer.stateless_call(
                layer.trainable_variables,
                layer.non_trainable_variables,
                x,
                training=True,
                mask=mask[:, 0],
            )
        elif name == "Flax nnx":
            y = nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0))(x, mask=mask)
        else:
            y = RUN[name]([x], masks=[mask])[0]
        return jnp.sum(jnp.where(mask, y * cotangent, 0))

    bad = np.isnan(np.asarray(jax.grad(loss)(x))).mean()
    return "finite" if bad == 0 else f"NaN in {bad:.0%}"


def inference_after(bad: np.ndarray, all_masked: bool = False):
    """The mean that inference uses after a good batch and then the batch `bad`."""

    def row(name) -> str:
        if all_masked and name not in HAS_MASK:
            return "no mask"
        good = batch() + 1
        masks = [jnp.ones((len(good), 1), bool), jnp.zeros((len(bad), 1), bool)]
        before = inference_moments(RUN[name]([good])[1])[0]
        kwargs = {"masks": masks} if all_masked else {}
        after = inference_moments(RUN[name]([good, bad], **kwargs)[1])[0]
        if after == before:
            return "untouched"
        return "NaN" if np.isnan(after) else f"moved by {after / before - 1:+.0%}"

    return row


def one_value(name) -> str:
    y, _ = RUN[name]([np.full((1, CHANNELS), 5.0, np.float32)], old=0.0)
    return f"y = {number(float(np.asarray(y)[0, 0]))}"


def half_precision(name) -> str:
    x = batch().astype(jnp.bfloat16)
    return str(RUN[name]([x])[0].dtype).removeprefix("torch.")


def half_precision_error(name) -> str:
    """The error of the scale of y for bfloat16 x of mean 8 and standard deviation 1."""
    x = np.asarray(batch(8192, mean=8.0).astype(jnp.bfloat16))
    y = RUN[name]([x])[0]
    y = y.float().numpy() if isinstance(y, torch.Tensor) else np.asarray(y)
    return number(np.abs(np.asarray(y, np.float64).std(0) - 1).max())


def integers(name) -> str:
    return str(RUN[name]([np.arange(12, dtype=np.int32).reshape(4, 3)])[0].dtype)


def uneven_sync(name) -> str:
    """The error of y over two instances that hold 48 and 8 examples under the same mask."""
    x = np.stack([batch(48), batch(48, mean=2.0, seed=1)])
    mask = np.stack([np.ones((48, 1), bool), np.arange(48)[:, None] < 8])
    kwargs: dict[str, Any] = {"axis_name": "devices"}
    if name == "jbn":
        params, stats = jbn.init_params(CHANNELS), jbn.init_stats(CHANNELS)
        f = lambda x, m: jbn.batch_norm(x, params, stats, mask=m, **kwargs)[0]  # noqa: E731
    elif name == "Flax linen":
        layer = nn.BatchNorm(use_running_average=False, **kwargs)
        variables = layer.init(jax.random.key(0), x[0])
        f = lambda x, m: layer.apply(variables, x, mask=m, mutable=["batch_stats"])[0]  # noqa: E731
    elif name == "Flax nnx":
        f = lambda x, m: nnx.BatchNorm(CHANNELS, rngs=nnx.Rngs(0), **kwargs)(x, mask=m)  # noqa: E731
    elif name == "PyTorch":
        return "GPU only"
    elif name == "Keras":
        keras.layers.BatchNormalization(synchronized=True)
        raise AssertionError("Keras has learned to synchronise on JAX")
    else:
        return "no mask"
    exact = x.astype(np.float64)[np.broadcast_to(mask, x.shape)].reshape(-1, CHANNELS)
    y = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    got = np.asarray(jax.vmap(f, axis_name="devices")(jnp.asarray(x), jnp.asarray(mask)))
    return number(np.abs(got[np.broadcast_to(mask, x.shape)].reshape(-1, CHANNELS) - y).max())


def with_nan(x):
    x[0, 0] = np.nan
    return x


ROWS: dict[str, Callable[[str], str]] = {
    "default epsilon": epsilon,
    "inference mean after 1 batch of mean 1": mean_after(1),
    "... after 100 such batches": mean_after(100),
    "inference std after 1 batch of std 10": std_after_one,
    "running variance of [-1, -1, 1, 1], old value forgotten": bessel,
    "error of y, float32, mean/std = 1e2": error_at(1e2),
    "... mean/std = 1e3": error_at(1e3),
    "... mean/std = 1e4": error_at(1e4),
    "std of y off by, bfloat16, mean/std = 8": half_precision_error,
    "dtype of y for bfloat16 x": half_precision,
    "dtype of y for int32 x": integers,
    "error of y under a mask": masked(100.0),
    "... with NaN at masked positions": masked(np.nan),
    "dx with NaN at masked positions": masked_gradient,
    "error of y, synchronised, masks of 48 and 8 examples": uneven_sync,
    "inference mean after a good and an all-masked batch": inference_after(batch(4), True),
    "... after a good and an empty batch": inference_after(batch(0)),
    "... after a good batch and one with a NaN": inference_after(with_nan(batch())),
    "one value per channel": one_value,
}


def cell(row, name) -> str:
    try:
        return row(name)
    except (TypeError, ValueError, RuntimeError, ZeroDivisionError) as e:
        return type(e).__name__


def main() -> None:
    packages = ["jax", "flax", "dm-haiku", "equinox", "torch", "keras"]
    versions = ", ".join(f"{p} {importlib.metadata.version(p)}" for p in packages)
    print("<!-- Written by docs/measure_peers.py. -->\n")
    print(f"Measured on a CPU with jbn {jbn.__version__}, {versions}.\n")
    print("| | " + " | ".join(RUN) + " |")
    print("|---|" + "---|" * len(RUN))
    for title, row in ROWS.items():
        print(f"| {title} | " + " | ".join(cell(row, name) for name in RUN) + " |", flush=True)


if __name__ == "__main__":
    main()
