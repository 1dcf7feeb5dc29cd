"""The derivative of Batch Normalization, (dx, dscale, dbias, dresidual) -> (dy, dmoments).

With xhat = (x - mean) rstd, rstd = 1/sqrt(var + epsilon), a = scale rstd and E the mean over the
batch, the differential of y = scale xhat + bias is

    dy = a dx + (dbias - a E[dx]) + xhat (dscale - a E[xhat dx])

and those of the moments are dmean = E[dx], dvar = 2 E[(x - mean) dx]. JAX transposes this linear
map into the backward pass: the two reductions sum(ybar) and sum(xhat ybar), and one elementwise
pass. Derivatives of any order follow, because the map is itself differentiable.

In the code z = x - shift, mean is the mean of z, and xhat = rstd (z - mean). So dy = a dx + u + v z
with

    v = rstd (dscale - a E[xhat dx]),    u = dbias - a E[dx] - v mean.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from jbn._core.affine import Affine, displaced, harmless, transform, where_data
from jbn._core.moments import derivative
from jbn._core.plan import Spec
from jbn._core.types import ShiftedMoments
from jbn._sums.protocol import Batch, Line
from jbn._xla.hints import recomputed
from jbn._xla.materialize import materialize
from jbn._xla.select import replaced


class Saved(NamedTuple):
    """The arrays of x's size that are saved for backward."""

    x: Array
    weights: Array | None
    kept: Array | None  # see `keep`


class Known(NamedTuple):
    """The results of the forward pass that the derivative uses, (1, ..., C) each."""

    moments: ShiftedMoments
    at: Affine


class Tangents(NamedTuple):
    """The direction of the derivative; None for an argument that is not given."""

    x: Array
    scale: Array | None
    bias: Array | None
    residual: Array | None


def keep(spec: Spec, y: Array, residual: Array | None) -> Array | None:
    """Returns the array that the derivative of the activation needs besides x, or None.

    For ReLU this is y: its sign is the mask, and the next layer saves it anyway. For all other
    activations it is the residual.
    """
    if spec.activation is None or residual is None:
        return None
    return y if spec.activation is jax.nn.relu else residual


@functools.partial(jax.jit, static_argnums=0)
def differential(
    spec: Spec, saved: Saved, known: Known, tangents: Tangents
) -> tuple[Array, Array, Array]:
    """Computes (dy, dmean, dvar), linear in the tangents.

    It is rematerialised, so that only its arguments are saved for backward: x in its own dtype, the
    mask or weights, and vectors with one number per feature. Otherwise autodiff would save xhat,
    which is float32 even if x is bfloat16.
    """
    function = functools.partial(_differential, spec)
    return recomputed(function)(saved, known, tangents)


def _differential(
    spec: Spec, saved: Saved, known: Known, tangents: Tangents
) -> tuple[Array, Array, Array]:
    x, weights, kept = saved
    m, at = known
    _, mean, rstd, a, _ = at
    tangents = jax.tree.map(lambda t: t.astype(a.dtype), tangents)
    dx, dresidual = tangents.x, tangents.residual
    dscale, dbias = (
        jnp.zeros_like(a) if t is None else spec.axes.expand(t)
        for t in (tangents.scale, tangents.bias)
    )
    if weights is not None and tangents.scale is not None:
        dscale = where_data(m.count, dscale)
    clean = m._replace(shift=at.shift, mean=mean)
    mean_dx, half_dvar = derivative(spec, x, weights, clean, dx)
    # Where rstd is 0, y is the bias, and the sums over z may be infinite.
    useless = lax.eq(rstd, np.asarray(0, rstd.dtype))
    mean_xhat_dx = replaced(rstd * half_dvar.astype(dx.dtype), useless, 0.0)
    (of_scale,) = materialize(dscale - a * mean_xhat_dx)  # transposed, the gradient of scale
    v = replaced(rstd * of_scale, useless, 0.0)  # (N, 1, ..., C) with a scale for each example
    u = dbias - a * mean_dx - mean * v
    if weights is not None:
        dx = harmless(dx, a * (x.astype(dx.dtype) - at.shift), weights)
    own = lax.mul(a, dx)
    own = own if dresidual is None else lax.add(own, dresidual)
    dy = _through_activation(spec, Batch(spec.axes, x, weights), at, Line(own, u, v, dbias), kept)
    return dy.astype(spec.dtype), mean_dx, 2 * half_dvar


def _through_activation(
    spec: Spec, batch: Batch, at: Affine, line: Line, kept: Array | None
) -> Array:
    """Computes the derivative of the activation; `line` is the derivative of its argument."""
    if kept is None:
        return spec.sums.spread(batch, at, line, spec.activation, spec.dtype)
    # The residual's gradient is an array in memory, which the next operations can use.
    if spec.activation is jax.nn.relu:
        # Select in y's dtype, that of the cotangent: the result is the residual's gradient.
        dy = spec.sums.spread(batch, at, line, None, spec.dtype)
        return jnp.where(kept > 0, dy, jnp.zeros_like(dy))
    assert spec.activation is not None
    argument = transform(displaced(batch.x, batch.weights, at), at.a, at.c, kept)
    along = spec.sums.spread(batch, at, line, None, argument.dtype)
    return jax.jvp(spec.activation, (argument,), (along,))[1]
