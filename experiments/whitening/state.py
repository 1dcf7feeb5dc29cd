"""Which running statistics serve inference better: the mean covariance, or the mean matrix W?

Batches come from a normal distribution of FEATURES correlated features. The covariances of the
batches are averaged, and so are their whitening matrices W, both by `jbn.ema(DECAY, debias=True)`.
Then each whitens the distribution itself. The error is how far its covariance is from I: the root
mean square over the eigenvalues of W Cov W - I. With drift, the standard deviations grow or fall by
a factor of 4 over the last 1 / (1 - DECAY) batches, as they may while a network trains.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbn
import jbn.whitening

FEATURES, STEPS, DECAY, EPSILON = 16, 1000, 0.99, 1e-5
BATCHES = (8, 17, 32, 64, 256)
DRIFTS = {"none": 1.0, "grows": 4.0, "falls": 0.25}


class Row(NamedTuple):
    """The errors of both, for one size of batches and one drift; medians over seeds."""

    drift: str
    batch: int
    covariance: float
    matrix: float


def measure(drift: str, batch: int, *, seeds: int = 3, steps: int = STEPS) -> Row:
    """Measures both errors."""
    run = functools.partial(_errors, DRIFTS[drift], batch, steps)
    errors = jax.jit(jax.vmap(run))(jnp.arange(seeds))
    return Row(drift, batch, *(float(np.median(v)) for v in errors))


def _errors(factor: float, batch: int, steps: int, seed: jax.Array) -> tuple[jax.Array, jax.Array]:
    kx, km = jax.random.split(jax.random.key(seed))
    mix = jnp.eye(FEATURES) + jax.random.normal(km, (FEATURES, FEATURES)) / FEATURES**0.5
    last = round(1 / (1 - DECAY))
    whitening = jbn.whitening.zca()

    def scale(step: jax.Array) -> jax.Array:
        return factor ** jnp.clip((step - (steps - last)) / last, 0.0, 1.0)

    def body(state: tuple, step: jax.Array) -> tuple:
        stats, matrix, weight = state
        z = jax.random.normal(jax.random.fold_in(kx, step), (batch, FEATURES))
        x = scale(step) * (z @ mix)
        rule = jbn.ema(DECAY, debias=True)
        _, stats = jbn.whitening.whiten(x, jbn.Params(None, None), stats, update=rule)
        cov = jnp.cov(x, rowvar=False, bias=True)
        matrix = DECAY * matrix + (1 - DECAY) * whitening(cov, EPSILON)
        return (stats, matrix, DECAY * weight + 1 - DECAY), None

    start = jbn.whitening.init_stats(FEATURES), jnp.zeros((FEATURES, FEATURES)), jnp.zeros(())
    (stats, matrix, weight), _ = jax.lax.scan(body, start, jnp.arange(steps))
    true = scale(jnp.asarray(steps)) ** 2 * mix.T @ mix
    first, second = (
        jnp.sqrt(jnp.mean((jnp.linalg.eigvalsh(w @ true @ w.T) - 1) ** 2))
        for w in (whitening(stats.cov[0], EPSILON), matrix / weight)
    )
    return first, second


def table(rows: list[Row]) -> str:
    """Formats the rows as a table of Markdown."""
    lines = [
        "| drift | examples a batch | error by the mean covariance | by the mean matrix |",
        "|---|---|---|---|",
    ]
    lines += [f"| {r.drift} | {r.batch} | {r.covariance:.3f} | {r.matrix:.3f} |" for r in rows]
    return "\n".join(lines)
