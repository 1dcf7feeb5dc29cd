"""The floating-point operations and the time of one whitening layer, beside Batch Normalization.

A competitor is forward and backward pass of one layer, for x: [POSITIONS, C] in float32. The
operations are XLA's own count, a number of each element of x; eigenvalues, which LAPACK computes,
are not in it (about 9 s^3 operations for a group of s features).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

import jbn
import jbn.whitening
from experiments.common import timing

POSITIONS = 32 * 16 * 16  # of a batch of 32 feature maps
WIDTHS = (64, 256)
SIZES = (16, 64)  # of groups, besides all features
METHODS = {
    "zca": jbn.whitening.zca(),
    "newton_schulz(5)": jbn.whitening.newton_schulz(5),
}


class Row(NamedTuple):
    """One layer: times are medians over the rounds."""

    features: int
    group: int  # 0 is jbn.batch_norm
    method: str
    flops: float  # per element of x, forward and backward
    milliseconds: float
    ratio: float  # of times, over jbn.batch_norm


def cases(features: int) -> Iterator[tuple[int, str]]:
    """Yields the group sizes and methods for a number of features; the first is batch_norm."""
    yield 0, "batch_norm"
    sizes = [s for s in SIZES if s < features]
    for size in (*sizes, features):
        for method in METHODS:
            yield size, method


def gradient(group: int, method: str, x: jax.Array, dy: jax.Array) -> Any:
    """Computes forward and backward pass of one layer: y, statistics and gradients."""
    params = jbn.init_params(x.shape[-1])
    if group:
        stats = jbn.whitening.init_stats(x.shape[-1], group_size=group)
        run = functools.partial(
            jbn.whitening.whiten, stats=stats, group_size=group, method=METHODS[method]
        )
    else:
        run = functools.partial(jbn.batch_norm, stats=jbn.init_stats(x.shape[-1]))
    y, pull, new = jax.vjp(lambda x, p: run(x, p), x, params, has_aux=True)
    return y, new, pull(dy)


def measure(features: int, rounds: int, positions: int = POSITIONS) -> list[Row]:
    """Measures all cases of a number of features, in turns."""
    kx, km, ky = jax.random.split(jax.random.key(features), 3)
    mix = jnp.eye(features) + jax.random.normal(km, (features, features)) / features**0.5
    x = jax.random.normal(kx, (positions, features)) @ mix
    dy = jax.random.normal(ky, x.shape)
    compiled = {
        case: jax.jit(functools.partial(gradient, *case)).lower(x, dy).compile()
        for case in cases(features)
    }
    calls: dict[str, Callable[[], object]] = {
        str(case): functools.partial(_finish, program, x, dy) for case, program in compiled.items()
    }
    samples = timing.interleave(calls, rounds)
    baseline = str(next(cases(features)))
    return [
        Row(
            features,
            *case,
            (program.cost_analysis() or {}).get("flops", float("nan")) / x.size,
            1e3 * samples.median(str(case)),
            samples.ratio(str(case), baseline).median,
        )
        for case, program in compiled.items()
    ]


def _finish(program: Any, *args: jax.Array) -> object:
    return jax.block_until_ready(program(*args))


def table(rows: list[Row]) -> str:
    """Formats the rows as a table of Markdown."""
    lines = [
        "| features | whitened together | method | operations an element | ms | over batch_norm |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        group = {0: "1", row.features: "all"}.get(row.group, str(row.group))
        lines.append(
            f"| {row.features} | {group} | {row.method} | {row.flops:.0f} | "
            f"{row.milliseconds:.1f} | {row.ratio:.1f} |"
        )
    return "\n".join(lines)
