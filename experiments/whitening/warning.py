"""Does the bias grow where the gradient ignores that the statistics depend on the parameters?

Section 2 of the paper: x = u + b, xhat = x - E[x]. If a gradient step ignores that E[x] depends on
b, it moves b by -rate * dloss/dxhat, and the normalisation takes that away again: the loss is what
it was, b is larger, and the next step is the same. Here u is a learned linear map of real digits
to ten features, and xhat are the logits. All steps use the same images.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array, lax

import jbn
import jbn.whitening
from experiments.whitening.training import Data

KINDS = ("centring", "each feature", "all features")
IMAGES, FEATURES, RATE, STEPS = 1_000, 10, 0.5, 2_000


class Curve(NamedTuple):
    """The course of one training; one number a step."""

    kind: str
    ignored: bool  # the gradient does not go through the statistics
    trained: str  # "bias", or "all": kernel and bias
    bias: np.ndarray  # the norm of b
    loss: np.ndarray


def curves(data: Data, steps: int = STEPS) -> list[Curve]:
    """Trains with each normalisation, with and without the derivative of its statistics."""
    images = jnp.asarray(data.images[:IMAGES], jnp.float32)
    labels = jnp.asarray(data.labels[:IMAGES])
    found = []
    for trained in ("bias", "all"):
        for kind in KINDS:
            for ignored in (False, True):
                bias, loss = train(images, labels, kind, ignored, trained == "all", steps)
                found.append(Curve(kind, ignored, trained, np.asarray(bias), np.asarray(loss)))
    return found


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))
def train(
    images: Array, labels: Array, kind: str, ignored: bool, kernel_too: bool, steps: int
) -> tuple[Array, Array]:
    """Returns the norm of the bias and the loss before each step."""

    def loss_of(params: dict[str, Array]) -> Array:
        kernel = params["kernel"] if kernel_too else lax.stop_gradient(params["kernel"])
        logits = normalised(images @ kernel + params["bias"][None, :], kind, ignored)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def step(params: dict[str, Array], _: Any) -> tuple[dict[str, Array], tuple[Array, Array]]:
        loss, gradient = jax.value_and_grad(loss_of)(params)
        moved = jax.tree.map(lambda p, g: p - RATE * g, params, gradient)
        return moved, (jnp.linalg.norm(params["bias"]), loss)

    kernel = jax.random.normal(jax.random.key(0), (images.shape[1], FEATURES)) / 10
    start = {"kernel": kernel, "bias": jnp.zeros(FEATURES)}
    return lax.scan(step, start, None, length=steps)[1]


def normalised(x: Array, kind: str, ignored: bool) -> Array:
    """Normalises x by its own statistics, [N, C]; `ignored`: as if they were constants."""
    if kind == "centring":
        mean = jbn.moments(x).mean
        return x - (lax.stop_gradient(mean) if ignored else mean)[None, :]
    plain, of_batch = jbn.Params(None, None), jbn.ema(0.0)
    if kind == "each feature":
        y, stats = jbn.batch_norm(x, plain, jbn.init_stats(FEATURES), update=of_batch)
        return jbn.batch_norm_inference(x, plain, stats) if ignored else y
    start = jbn.whitening.init_stats(FEATURES)
    y, stats = jbn.whitening.whiten(x, plain, start, update=of_batch)
    return jbn.whitening.whiten_inference(x, plain, stats) if ignored else y


def table(found: list[Curve]) -> str:
    """Formats the ends as a table of Markdown."""
    lines = [
        "| trained | normalisation | gradient of the statistics | norm of b | loss: first, last |",
        "|---|---|---|---|---|",
    ]
    for c in found:
        through = "ignored" if c.ignored else "yes"
        lines.append(
            f"| {c.trained} | {c.kind} | {through} | {c.bias[-1]:.2g} "
            f"| {c.loss[0]:.3f} {c.loss[-1]:.3f} |"
        )
    return "\n".join(lines)
