"""(x, scale, bias) -> (y, Moments): the transform, and the one derivative rule of the library.

With xhat = (x - mean) rstd, rstd = 1/sqrt(var + epsilon), a = scale rstd and E the mean over the
batch, the differential of y = scale xhat + bias is

    dy = a dx + (dbias - a E[dx]) + xhat (dscale - a E[xhat dx])

and those of the moments are dmean = E[dx], dvar = 2 E[(x - mean) dx]. JAX transposes this linear
map into the backward pass: the two reductions sum(ybar) and sum(xhat ybar), and one elementwise
pass. Derivatives of any order follow, because the rule is itself differentiable.

The map is wrapped in `jax.checkpoint`, so what a backward pass keeps is what the map was given:
x in its own dtype, the mask or weights, and vectors with one number per feature. Without it,
autodiff would keep xhat, which is float32 even where x is bfloat16.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike, DTypeLike

from jbn import _check, _sharding
from jbn._axes import Axes
from jbn._checkpoint import named
from jbn._devices import spread
from jbn._moments import (
    Problem,
    derivative,
    differentiable_measure,
    only_active,
    prepare,
)
from jbn._once import made_once
from jbn._pool import Moments, pool_groups, restore
from jbn._reference import accumulator, active
from jbn._sync import AxisName, Scope, scope, vary_as

Activation = Callable[[Array], Array]


class Params(NamedTuple):
    """The learned affine map of Batch Normalization, y = scale * xhat + bias (Alg. 1).

    Attributes:
      scale: [C], the paper's gamma; None for 1.
      bias: [C], the paper's beta; None for 0.
    """

    scale: Array | None
    bias: Array | None


def init_params(features: int | Sequence[int], dtype: DTypeLike = jnp.float32) -> Params:
    """Scale 1 and bias 0 for `features` features (a tuple if there are several feature axes).

    >>> import jbn
    >>> jbn.init_params(2)
    Params(scale=Array([1., 1.], dtype=float32), bias=Array([0., 0.], dtype=float32))
    """
    dtype, features = _check.params_dtype(dtype), _check.number_of_features(features)
    return Params(jnp.ones(features, dtype), jnp.zeros(features, dtype))


def normalize(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    groups: int | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, Moments]:
    """Normalises every feature of x by the moments of x itself (Alg. 1).

        mean = E[x],  var = E[(x - mean)^2],  y = scale (x - mean) / sqrt(var + epsilon) + bias
        y = activation(y + residual)    if given

    >>> import jax.numpy as jnp, jbn
    >>> y, m = jbn.normalize(jnp.array([[1.0], [3.0]]))
    >>> print(y.round(3), m.mean)
    [[-1.]
     [ 1.]] [2.]

    Args:
      x: [N, ..., C], floating point.
      scale: [C], or None for 1.
      bias: [C], or None for 0.
      axis: the feature axis or axes, C.
      epsilon: is added to the variance, inside the root.
      mask: bool, of x's rank, broadcasts against x. False: the value takes no part in the moments,
        and is normalised by those of the others.
      weights: real and not negative, broadcasts like `mask`. Zero is the same as masked; a
        negative or NaN weight counts as zero.
      axis_name: take the moments over these named axes (of vmap, pmap, shard_map) as well.
      axis_index_groups: as in `jax.lax.psum`.
      groups: normalise each of this many equal, consecutive parts of the batch by its own moments.
      activation: an elementwise function, such as `jax.nn.relu`.
      residual: of x's shape, is added before the activation.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the moments. Both are differentiable in x, scale and bias to any order,
      masked positions included. What a masked position holds touches no other value and no other
      gradient: where it is not finite, xhat is 0 there. A feature without any data gives its bias.
      Of activation and residual a backward pass keeps the residual alone, or y where the activation
      is `jax.nn.relu`: no mask, no sum.

    Raises:
      NameError: no vmap, pmap or shard_map binds axis_name.
      TypeError: x or residual is not floating point, dtype cannot hold y, mask is not bool, or
        activation is no function of JAX.
      ValueError: axis, scale, bias, mask, weights, groups or residual do not fit x's shape, epsilon
        < 0, or activation changes the shape or mixes elements.
    """
    prepared = prepare(x, axis, mask, weights, scope(axis_name, axis_index_groups), groups)
    x = jnp.asarray(x)
    return _transform(x, prepared, scale, bias, epsilon, activation, residual, dtype)


def normalize_pooled(
    x: Array,
    scale,
    bias,
    *,
    axis,
    epsilon,
    mask,
    weights,
    over: Scope,
    groups,
    activation,
    residual,
    dtype,
) -> tuple[Array, Moments]:
    """`normalize`, but with the moments of all groups together: what running statistics take in."""
    prepared = prepare(x, axis, mask, weights, over, groups)
    return _transform(x, prepared, scale, bias, epsilon, activation, residual, dtype, pooled=True)


def _transform(
    x, prepared, scale, bias, epsilon, activation, residual, dtype, pooled=False
) -> tuple[Array, Moments]:
    problem, divided, weights = prepared
    activation = _check.activation(activation, divided.shape, accumulator(x.dtype))
    residual = _check.residual(residual, x)
    if residual is not None:
        residual = _sharding.divide(residual, problem.axes)
        if weights is not None:
            # The backward pass keeps the residual, which others may keep as well, and no mask.
            harmless = jax.checkpoint(_harmless, prevent_cse=False)
            residual = harmless(residual, residual, weights)
    scale, bias = affine(scale, bias, problem.axes)
    dtype = _check.output_dtype(dtype, x, scale=scale, bias=bias, residual=residual)
    rule = _Rule(problem, _check.epsilon(epsilon), activation, dtype, pooled)
    run = _normalize if isinstance(divided, Tracer) else _eager
    y, m = run(rule, divided, scale, bias, weights, residual)
    return _sharding.join(y, x, problem.axes), m


def affine(scale, bias, axes: Axes) -> tuple[Array | None, Array | None]:
    """Scale and bias, checked."""
    return (
        None if scale is None else _check.features("scale", scale, axes),
        None if bias is None else _check.features("bias", bias, axes),
    )


def expanded(scale, bias, axes: Axes, dtype: DTypeLike) -> tuple[Array, Array]:
    """Scale and bias, broadcast against x; 1 and 0 where None."""
    real = jnp.finfo(dtype).dtype
    scale = jnp.ones(axes.feature_shape, real) if scale is None else scale
    bias = jnp.zeros(axes.feature_shape, real) if bias is None else bias
    return axes.expand(scale), axes.expand(bias)


def transform(z: Array, a: Array, c: Array, residual: Array | None) -> Array:
    """a z + c + residual, in z's dtype (Alg. 1, lines 3 and 4)."""
    y = z * a + c
    return y if residual is None else y + _widened(residual, z.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _widened(values: Array, dtype: np.dtype) -> Array:
    """`values` in a wider dtype.

    From bfloat16 by its bits. XLA knows that a conversion to bfloat16 and back may be dropped, and
    would keep the float32 sums of a whole residual network in memory, at twice the size.
    """
    if values.dtype != jnp.bfloat16 or dtype != jnp.float32:
        return values.astype(dtype)
    bits = lax.bitcast_convert_type(values, jnp.uint16).astype(jnp.uint32) << 16
    return lax.bitcast_convert_type(bits, jnp.float32)


@_widened.defjvp
def _widened_jvp(dtype: np.dtype, primals, tangents):
    return _widened(*primals, dtype), tangents[0].astype(dtype)


class Place(NamedTuple):
    """Where a feature lies, as few numbers as possible: in a pass over x each has its price.

    scale (x - mean) / sqrt(var + epsilon) + bias is scale rstd (z - rest) + bias, z = x - center.
    """

    center: Array  # the mean, rounded
    rest: Array  # the mean - center
    rstd: Array  # 1 / sqrt(var + epsilon)

    def fold(self, scale: Array, bias: Array) -> tuple[Array, Array]:
        """(a, c) of y = a z + c."""
        a = scale.astype(self.rstd.dtype) * self.rstd
        return a, bias.astype(self.rstd.dtype) - a * self.rest


def place(shift: Array, m: Moments, epsilon: float) -> Place:
    """Of a feature of which m are the moments of x - shift."""
    mean, rstd = location(m.mean, m.var, epsilon)
    center = shift + mean
    return Place(center, mean - (center - shift), rstd)


def location(mean: Array, var: Array, epsilon: float) -> tuple[Array, Array]:
    """(mean, 1 / sqrt(var + epsilon)), in mean's dtype.

    Both are 0 where there is nothing to divide by (var + epsilon = 0) or too much (var = inf, and
    the mean perhaps as well), so that y is the bias.
    """
    var = var + jnp.asarray(epsilon, var.dtype)
    rstd = lax.rsqrt(jnp.where((var <= 0) | (var == jnp.inf), jnp.inf, var)).astype(mean.dtype)
    return jnp.where(rstd == 0, 0.0, mean), rstd


class _Rule(NamedTuple):
    """What is static in the derivative rule."""

    problem: Problem
    epsilon: float
    activation: Activation | None
    dtype: np.dtype  # of y
    pooled: bool  # moments of all groups together


class _Known(NamedTuple):
    """What a layer knows about its features, of shape (1, ..., C): of that its derivative is made.

    Moments are those of x - shift.
    """

    shift: Array
    moments: Moments
    place: Place
    folded: tuple[Array, Array]  # (a, c)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(rule: _Rule, x, scale, bias, weights, residual) -> tuple[Array, Moments]:
    """y and the moments of x; scale and bias are [C] or None."""
    return _forward(rule, x, scale, bias, weights, residual)[:2]


_eager = jax.jit(_normalize, static_argnums=0)  # a custom rule is slow to call by itself


# This and `_differential` are not inlined: layers of one shape are then traced, differentiated and
# lowered once a program.
@functools.partial(jax.jit, static_argnums=0)
def _forward(rule: _Rule, x, scale, bias, weights, residual) -> tuple[Array, Moments, _Known]:
    # The two by themselves, so that whoever computes y again need not measure again.
    shift, m = named(differentiable_measure(rule.problem, x, weights))
    scale, bias = expanded(scale, bias, rule.problem.axes, accumulator(x.dtype))
    if weights is not None:
        scale = _where_data(m.count, scale)  # without data y is the bias
    at = place(shift, m, rule.epsilon)
    vectors = (m.mean, m.var, *at, *at.fold(scale, bias))
    mean, var, center, rest, rstd, a, c = made_once(*vectors)
    known = _Known(shift, Moments(m.count, mean, var), Place(center, rest, rstd), (a, c))
    y = transform(_displaced(x, center, rest, a, weights), a, c, residual)
    y = (y if rule.activation is None else rule.activation(y)).astype(rule.dtype)
    return y, _of_x(rule, known.moments, shift, weights), known


def _where_data(count: Array, values: Array) -> Array:
    """`values`, 0 for features without data."""
    values = values + jnp.zeros_like(count, values.dtype)  # plus zeros: of the counts' sharding
    return jnp.where(count > 0, values, jnp.zeros_like(values))


def _displaced(x: Array, center: Array, rest: Array, a: Array, weights: Array | None) -> Array:
    """x - center at every position, masked ones included; of xhat 0 where x is not finite there."""
    z = x.astype(center.dtype) - center
    return _harmless(z, z * a, weights, otherwise=rest)


def _harmless(values: Array, at: Array, weights: Array | None, otherwise: ArrayLike = 0.0) -> Array:
    """`values`, but `otherwise` at positions that are masked and where `at` is not finite.

    So y is a constant there, the bias, and a NaN in the padding of a batch reaches no gradient.
    """
    if weights is None:
        return values
    return jnp.where(active(weights) | jnp.isfinite(at), values, otherwise)


def _of_x(rule: _Rule, m: Moments, shift: Array, weights: Array | None) -> Moments:
    """Moments of x - K -> those of x."""
    axes = rule.problem.axes
    if rule.pooled:
        return pool_groups(m, shift, axes, counts_differ=weights is not None)
    return restore(m, shift, axes)


@_normalize.defjvp
def _normalize_jvp(rule: _Rule, primals, tangents):
    x, _, _, weights, residual = primals
    dx, dscale, dbias, _, dresidual = tangents  # weights are constants, and so is K
    dx = _sharding.alongside(dx, x)
    y, m, known = _forward(rule, *primals)
    data = x, weights, _kept(rule, y, residual)
    return (y, m), _differential(rule, data, known, (dx, dscale, dbias, dresidual))


@functools.partial(jax.jit, static_argnums=0)
def _differential(rule: _Rule, data, known: _Known, tangents) -> tuple[Array, Moments]:
    """The linear map (dx, dscale, dbias, dresidual) -> (dy, dm) of the docstring above."""

    def differential(data, known, tangents):
        x, weights, kept = data
        (shift, m, at, (a, c)), axes = known, rule.problem.axes
        tangents = jax.tree.map(lambda t: t.astype(at.center.dtype), tangents)
        dx, dscale, dbias, dresidual = tangents
        dscale, dbias = (
            jnp.zeros_like(a) if t is None else axes.expand(t) for t in (dscale, dbias)
        )
        if weights is not None and tangents[1] is not None:
            dscale = _where_data(m.count, dscale)
        active_dx = only_active(dx, weights)
        mean_dx, half_dvar = derivative(
            rule.problem, x, at.center, active_dx, m.count, at.rest, weights
        )
        dx = _harmless(dx, a * (x.astype(dx.dtype) - at.center), weights)
        # Where rstd is 0, as y is the bias, the sums over z may be infinite.
        mean_xhat_dx = jnp.where(at.rstd == 0, 0.0, at.rstd * half_dvar.astype(dx.dtype))
        slope = jnp.where(at.rstd == 0, 0.0, at.rstd * (dscale - a * mean_xhat_dx))
        own = a * dx if dresidual is None else a * dx + dresidual
        others = dbias - a * mean_dx - at.rest * slope, slope
        dy = _through(rule, x, at, weights, kept, (a, c), own, others, dbias)
        dm = Moments(jnp.zeros_like(m.count), mean_dx, 2 * half_dvar)
        _, dm = jax.jvp(lambda m: _of_x(rule, m, shift, weights), (m,), (dm,))
        return dy.astype(rule.dtype), dm

    # prevent_cse=False: the compiler may keep what it wants; only autodiff must not.
    return jax.checkpoint(differential, prevent_cse=False)(data, known, tangents)


def _through(rule: _Rule, x, at: Place, weights, kept, vectors, own, others, dbias) -> Array:
    """The derivative of the activation along own + u + z v, where u, v = others, z = x - center.

    Where y is the bias, because a masked x is not finite, along `dbias`.

    `vectors` are (a, c) of the activation's input a z + c; `kept` is as `_kept` says.
    """
    activation, kernel = rule.activation, rule.problem.kernel
    center, rest, _ = at
    is_relu = activation is jax.nn.relu
    if kernel is not None and (activation is None or is_relu):
        row = rule.problem.axes.squeeze
        gate = tuple(map(row, vectors)) if is_relu and kept is None else None
        u, v = map(row, others)
        dy = kernel.spread(x, row(center), u, v, own, gate=gate, dtype=rule.dtype)
        return dy if kept is None else jnp.where(kept > 0, dy, jnp.zeros_like(dy))
    a, c = vectors
    z = _displaced(x, center, rest, a, weights)
    # Backwards `v` gives the sum of z dy. Without the choice, XLA for CPUs takes z from memory,
    # where it has lain since the forward pass: as much as x again. For finite z the choice is v
    # whatever z is, so that every derivative is that of z v.
    u, v = (spread(rule.problem.axes, x, values) for values in others)
    others = z * jnp.where(jnp.isfinite(z), v, jnp.zeros_like(v)) + u
    if weights is not None:
        xhat = a * (x.astype(center.dtype) - center)
        others = _harmless(others, xhat, weights, otherwise=vary_as(x, dbias))
    if activation is None:
        return own + others
    if kept is not None:  # the residual's gradient is an array, which both parts may use
        if is_relu:  # chosen in y's dtype: the cotangent is, and is that array of the residual's
            dy = (own + others).astype(rule.dtype)
            return jnp.where(kept > 0, dy, jnp.zeros_like(dy))
        return jax.jvp(activation, (transform(z, a, c, kept),), (own + others,))[1]
    # Backwards, `others` gives the sums over the batch, and `own` the pass over x that follows. The
    # input of the activation is computed in each by itself: to the compiler the barrier makes them
    # two. Else it keeps the mask, or the masked cotangent, for the second, which is more traffic.
    first = transform(z, a, c, None)
    a, c = lax.optimization_barrier(vectors)
    second = transform(z, a, c, None)
    return jax.jvp(activation, (first,), (own,))[1] + jax.jvp(activation, (second,), (others,))[1]


def _kept(rule: _Rule, y: Array, residual: Array | None) -> Array | None:
    """What the derivative of the activation needs besides x, or None.

    The residual. Of relu y itself: what comes next keeps it anyway, as it may not the residual.
    """
    if rule.activation is None or residual is None:
        return None
    return y if rule.activation is jax.nn.relu else residual
