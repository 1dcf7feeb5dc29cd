"""The derivative of Batch Normalization, (dx, dscale, dbias, dresidual) -> (dy, dmoments).

With xhat = (x - mean) rstd, rstd = 1/sqrt(var + epsilon), a = scale rstd and E the mean over the
batch, the differential of y = scale xhat + bias is

    dy = a dx + (dbias - a E[dx]) + xhat (dscale - a E[xhat dx])

and those of the moments are dmean = E[dx], dvar = 2 E[(x - mean) dx]. JAX transposes this linear
map into the backward pass: the two reductions sum(ybar) and sum(xhat ybar), and one elementwise
pass. Derivatives of any order follow, because the map is itself differentiable.

In the code z = x - shift and mean is that of z, xhat = rstd (z - mean), so that dy = a dx + u + v z
with

    v = rstd (dscale - a E[xhat dx]),    u = dbias - a E[dx] - v mean.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn._affine import displaced, harmless, transform, where_data
from jbn._devices import spread
from jbn._materialize import materialize
from jbn._moments import derivative, only_active
from jbn._plan import Spec
from jbn._pool import ShiftedMoments
from jbn._select import replaced
from jbn._sync import vary_as


class Saved(NamedTuple):
    """The arrays of x's size that the backward pass keeps."""

    x: Array
    weights: Array | None
    kept: Array | None  # see `keep`


class Known(NamedTuple):
    """The results of the forward pass that the derivative is made of, (1, ..., C) each."""

    moments: ShiftedMoments
    mean: Array  # of z; 0 where rstd is 0
    rstd: Array
    a: Array
    c: Array


class Tangents(NamedTuple):
    """The direction; None where an argument is not given."""

    x: Array
    scale: Array | None
    bias: Array | None
    residual: Array | None


class _Line(NamedTuple):
    """The derivative of the activation's input, own + u + v z; `constant` where x is not finite."""

    own: Array  # a dx + dresidual, of x's shape
    u: Array
    v: Array
    constant: Array  # the derivative where a masked x is not finite: y is the bias there


def keep(spec: Spec, y: Array, residual: Array | None) -> Array | None:
    """Returns what the derivative of the activation needs besides x, or None.

    That is the residual, or for ReLU y: its sign is the mask, and the next layer keeps it anyway.
    """
    if spec.activation is None or residual is None:
        return None
    return y if spec.activation is jax.nn.relu else residual


@functools.partial(jax.jit, static_argnums=0)
def differential(
    spec: Spec, saved: Saved, known: Known, tangents: Tangents
) -> tuple[Array, Array, Array]:
    """(dy, dmean, dvar), linear in the tangents.

    Wrapped in `jax.checkpoint`, so that a backward pass keeps what it is given: x in its own dtype,
    the mask or weights, and vectors with one number per feature. Else autodiff would keep xhat,
    which is float32 even where x is bfloat16. prevent_cse=False: the compiler may keep what it
    wants; only autodiff must not.
    """
    function = functools.partial(_differential, spec)
    return jax.checkpoint(function, prevent_cse=False)(saved, known, tangents)


def _differential(
    spec: Spec, saved: Saved, known: Known, tangents: Tangents
) -> tuple[Array, Array, Array]:
    x, weights, _ = saved
    m, mean, rstd, a, _ = known
    tangents = jax.tree.map(lambda t: t.astype(a.dtype), tangents)
    dx, dresidual = tangents.x, tangents.residual
    dscale, dbias = (
        jnp.zeros_like(a) if t is None else spec.axes.expand(t)
        for t in (tangents.scale, tangents.bias)
    )
    if weights is not None and tangents.scale is not None:
        dscale = where_data(m.count, dscale)
    clean = m._replace(mean=mean)
    mean_dx, half_dvar = derivative(spec, x, weights, clean, only_active(dx, weights))
    # Where rstd is 0, as y is the bias, the sums over z may be infinite.
    useless = rstd == 0
    mean_xhat_dx = replaced(rstd * half_dvar.astype(dx.dtype), useless, 0.0)
    (of_scale,) = materialize(dscale - a * mean_xhat_dx)  # backwards, the gradient of scale
    v = replaced(rstd * of_scale, useless, 0.0)
    u = dbias - a * mean_dx - mean * v
    own = a * harmless(dx, a * (x.astype(dx.dtype) - m.shift), weights)
    own = own if dresidual is None else own + dresidual
    dy = _through_activation(spec, saved, known, _Line(own, u, v, dbias))
    return dy.astype(spec.dtype), mean_dx, 2 * half_dvar


def _through_activation(spec: Spec, saved: Saved, known: Known, line: _Line) -> Array:
    """The derivative of the activation along the derivative of its input."""
    is_relu = spec.activation is jax.nn.relu
    if spec.kernel is not None and (spec.activation is None or is_relu):
        return _by_kernel(spec, saved, known, line)
    # Else the compiler keeps the z of the forward pass: as much as x again.
    shift = lax.optimization_barrier(known.moments.shift)
    z = displaced(saved.x, shift, known.mean, known.a, saved.weights)
    others = _of_the_batch(spec, saved, known, line, z)
    if spec.activation is None:
        return line.own + others
    if saved.kept is None:
        return _activated(spec, known, z, line.own, others)
    # The residual's gradient is an array, which both parts may use.
    if is_relu:  # chosen in y's dtype: the cotangent is, and is that array of the residual's
        return _where_positive(saved.kept, (line.own + others).astype(spec.dtype))
    inputs = transform(z, known.a, known.c, saved.kept)
    return jax.jvp(spec.activation, (inputs,), (line.own + others,))[1]


def _by_kernel(spec: Spec, saved: Saved, known: Known, line: _Line) -> Array:
    """Does the same for no activation or ReLU, in one pass of the kernel."""
    row, x, kept = spec.axes.squeeze, saved.x, saved.kept
    gate = (row(known.a), row(known.c)) if spec.activation is not None and kept is None else None
    shift, u, v = map(row, (known.moments.shift, line.u, line.v))
    dy = spec.kernel.spread(x, shift, u, v, line.own, gate=gate, dtype=spec.dtype)
    return dy if kept is None else _where_positive(kept, dy)


def _where_positive(kept: Array, dy: Array) -> Array:
    return jnp.where(kept > 0, dy, jnp.zeros_like(dy))


def _of_the_batch(spec: Spec, saved: Saved, known: Known, line: _Line, z: Array) -> Array:
    """Computes u + v z, the part that comes through the moments, scale and bias."""
    u, v = (spread(spec.axes, saved.x, values) for values in (line.u, line.v))
    others = z * v + u
    if saved.weights is None:
        return others
    shift = known.moments.shift
    xhat = known.a * (saved.x.astype(shift.dtype) - shift)
    constant = vary_as(saved.x, line.constant)
    return harmless(others, xhat, saved.weights, otherwise=constant)


def _activated(spec: Spec, known: Known, z: Array, own: Array, others: Array) -> Array:
    """The derivative of the activation along own + others, each by itself.

    Backwards, `others` gives the sums over the batch, and `own` the pass over x that follows. The
    input of the activation is computed in each by itself: to the compiler the barrier makes them
    two. Else it keeps the mask, or the masked cotangent, for the second, which is more traffic.
    """
    assert spec.activation is not None
    first = transform(z, known.a, known.c, None)
    a, c = lax.optimization_barrier((known.a, known.c))
    second = transform(z, a, c, None)
    of_own = jax.jvp(spec.activation, (first,), (own,))[1]
    return of_own + jax.jvp(spec.activation, (second,), (others,))[1]
