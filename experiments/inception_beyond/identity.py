"""Trains a Batch Normalization layer to become the identity, where the identity is best.

Section 3: scale = sqrt(Var[x]) and bias = E[x] "could recover the original activations, if that
were the optimal thing to do". Here it is: the input of the layer is the output of a convolution of
an Inception network, and SGD trains the layer to return its input, on

    loss = 1/2 sum over features of mean (BN(x) - x)^2

It starts from scale 1 and bias 0, and normalises by the moments of every batch. For this loss a
step of SGD is

    scale <- (1 - rate) scale + rate sqrt(var_B),      bias <- (1 - rate) bias + rate mean_B

(epsilon aside): the layer learns the moving averages of its batches' moments.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import jbn
from experiments.common.records import Records
from experiments.nets import bn_inception

EPSILON = 1e-5


class Learned(NamedTuple):
    """A layer's parameters after each step, and their ideal values."""

    scale: np.ndarray  # [T, C], from before the first step
    bias: np.ndarray  # [T, C]
    std: np.ndarray  # [C] sqrt(Var[x] + epsilon) of all images and positions
    mean: np.ndarray  # [C]
    residual: float  # RMS of BN(x) - x at the end, by the statistics of all images; in units of std

    @property
    def scale_error(self) -> np.ndarray:
        """Relative errors of the scales, ``[T, C]``."""
        return abs(self.scale / self.std - 1)

    @property
    def bias_error(self) -> np.ndarray:
        """Errors of the biases, ``[T, C]``, in units of the standard deviation."""
        return abs(self.bias - self.mean) / self.std


def activations(
    net: bn_inception.Inception, variables: Any, images: jax.Array, path: tuple[str, ...]
) -> jax.Array:
    """Computes the output of a unit's convolution, before normalisation and nonlinearity."""

    def wanted(module: nn.Module, _: str) -> bool:
        return module.path[:-1] == path and str(module.name).startswith("Conv_")

    def forward(variables: Any, images: jax.Array) -> list[jax.Array]:
        _, state = net.apply(variables, images, train=False, capture_intermediates=wanted)
        return jax.tree.leaves(state.get("intermediates", {}))

    found = jax.jit(forward)(variables, images)
    if not found:
        raise ValueError(
            f"no unit {'/'.join(path)!r} in the network. Expected one with a convolution, such as "
            "'ConvUnit_0' or 'inception_3a/ConvUnit_1'."
        )
    return found[-1]  # a separable convolution has two: the second one


def learn(x: jax.Array, *, batch: int, steps: int, rate: float, seed: int = 0) -> Learned:
    """Trains a layer to return its input.

    Args:
      x: ``[n, ..., C]``, the input.
      batch: how many of the n are in a batch; n: every batch has the same ones.
      steps: of SGD.
      rate: constant learning rate.
      seed: decides the order.
    """
    params: Any = jbn.init_params(x.shape[-1])
    order = jnp.asarray(orders(len(x), batch, steps, seed))
    last, after = descend(params, x, order, jnp.float32(rate))
    scale, bias = (np.concatenate([a[None], b]) for a, b in zip(params, after, strict=True))
    mean, var = moments(x)
    std = np.sqrt(var + EPSILON)
    whole = jbn.RunningStats(jnp.float32(mean), jnp.float32(var), jnp.ones(std.shape))
    back = jbn.batch_norm_inference(x, last, whole, epsilon=EPSILON)
    residual = np.asarray(back - x, np.float64) / std
    return Learned(scale, bias, std, mean, float(np.sqrt((residual**2).mean())))


@jax.jit
def descend(params: Any, x: jax.Array, order: jax.Array, rate: jax.Array) -> tuple[Any, Any]:
    """Returns the parameters after the last step, and after each step."""
    stats = jbn.init_stats(x.shape[-1])

    def loss(params: Any, x: jax.Array) -> jax.Array:
        y, _ = jbn.batch_norm(x, params, stats, epsilon=EPSILON)
        return 0.5 * jnp.mean((y - x) ** 2) * x.shape[-1]

    def step(params: Any, chosen: jax.Array) -> tuple[Any, Any]:
        gradient = jax.grad(loss)(params, x[chosen])
        params = jax.tree.map(lambda p, g: p - rate * g, params, gradient)
        return params, params

    return jax.lax.scan(step, params, order)


def orders(n: int, batch: int, steps: int, seed: int) -> np.ndarray:
    """Draws the examples of each batch, ``[steps, batch]``: all of them once before one repeats."""
    rng = np.random.default_rng(seed)
    epochs = -(-steps * batch // n)
    chosen = np.concatenate([rng.permutation(n) for _ in range(epochs)])
    return chosen[: steps * batch].reshape(steps, batch)


def moments(x: jax.Array) -> tuple[np.ndarray, np.ndarray]:
    """Returns mean and variance of each feature over all other axes, in float64."""
    values = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
    return values.mean(0), values.var(0)


def write_identity(records: Records, batch: int, found: Learned) -> None:
    """Writes the errors at steps 0, 1, 2, 4, 8, ...; and each feature at the end."""
    last = len(found.scale) - 1
    for step in sorted({0, last, *(2**i for i in range(last.bit_length()))}):
        scale, bias = found.scale_error[step], found.bias_error[step]
        records.write("error", batch=batch, step=step, scale_median=float(np.median(scale)),
                      scale_worst=float(scale.max()), bias_median=float(np.median(bias)),
                      bias_worst=float(bias.max()))  # fmt: skip
    values = zip(found.scale[-1], found.std, found.bias[-1], found.mean, strict=True)
    for i, (scale, std, bias, mean) in enumerate(values):
        records.write("feature", batch=batch, feature=i, scale=float(scale), std=float(std),
                      bias=float(bias), mean=float(mean))  # fmt: skip
    records.write("residual", batch=batch, residual=found.residual)


def identity_table(learned: dict[str, Learned]) -> list[list[str]]:
    """Makes a line for each size of batches."""
    rows = [["", "error of scale: median", "worst", "of bias: median", "worst", "BN(x) - x"]]
    for name, found in learned.items():
        errors = found.scale_error[-1], found.bias_error[-1]
        values = [f(e) for e in errors for f in (np.median, np.max)]
        rows.append([name, *(f"{v:.2%}" for v in (*values, found.residual))])
    return rows
