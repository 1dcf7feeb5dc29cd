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
from jax.typing import ArrayLike, DTypeLike

from jbn import _check, _sharding
from jbn._axes import Axes
from jbn._checkpoint import named
from jbn._moments import (
    Problem,
    derivative,
    differentiable_measure,
    measure,
    only_active,
    prepare,
    shifted,
)
from jbn._pool import Moments, pool_groups, restore
from jbn._reference import accumulator
from jbn._sharding import is_explicitly_sharded
from jbn._sync import AxisName, Scope, scope, varying

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
      mask: bool, of x's rank, broadcasts against x. False: the value takes no part, neither in
        the moments nor in any derivative, and may be NaN.
      weights: real and not negative, broadcasts like `mask`. Zero is the same as masked; a
        negative or NaN weight counts as zero.
      axis_name: take the moments over these named axes (of vmap, pmap, shard_map) as well.
      axis_index_groups: as in `jax.lax.psum`.
      groups: normalise each of this many equal, consecutive parts of the batch by its own moments.
      activation: an elementwise function, such as `jax.nn.relu`.
      residual: of x's shape, is added before the activation.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the moments. Both are differentiable in x, scale and bias to any order.
      A masked position shows x normalised by the others' moments, as a constant: what it holds
      touches no other value and its gradient is 0. A feature without any data gives its bias.
      Of activation and residual a backward pass keeps the residual alone, or y where the activation
      is `jax.nn.relu`: no mask, no sum.

    Raises:
      NameError: no vmap, pmap or shard_map binds axis_name.
      TypeError: x or residual is not floating point, mask is not bool, or activation not callable.
      ValueError: axis, scale, bias, mask, weights, groups or residual do not fit x's shape, epsilon
        < 0, or activation changes the shape.
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
    dtype = np.dtype(x.dtype if dtype is None else dtype)
    rule = _Rule(problem, _check.epsilon(epsilon), activation, dtype)
    residual = _check.residual(residual, x)
    if residual is not None:
        residual = _sharding.divide(residual, problem.axes)
    scale, bias = affine(scale, bias, problem.axes)
    y, m = _layer(rule, pooled, divided, scale, bias, weights, residual)
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
    usable = (var > 0) & (var < jnp.inf) | jnp.isnan(var)
    rstd = lax.rsqrt(jnp.where(usable, var, jnp.ones_like(var))).astype(mean.dtype)
    return jnp.where(usable, mean, 0), jnp.where(usable, rstd, 0)


class _Rule(NamedTuple):
    """What is static in the derivative rule."""

    problem: Problem
    epsilon: float
    activation: Activation | None
    dtype: np.dtype  # of y


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _normalize(rule: _Rule, x, scale, bias, weights, residual) -> tuple[Array, Moments, Array]:
    """y, the moments of z = x - K, and K. Per-feature values have the shape (1, ..., C)."""
    shift, m = measure(rule.problem, x, weights)
    return _apply(rule, x, scale, bias, weights, residual, m, shift), m, shift


# Not inlined: layers of one shape are then traced, differentiated and lowered once a program.
@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer(rule: _Rule, pooled: bool, x, scale, bias, weights, residual) -> tuple[Array, Moments]:
    """y and the moments of x; `pooled`: of all groups together."""
    axes = rule.problem.axes
    scale, bias = expanded(scale, bias, axes, accumulator(x.dtype))
    y, m, shift = _normalize(rule, x, scale, bias, weights, residual)
    if pooled:
        return y, pool_groups(m, shift, axes, counts_differ=weights is not None)
    return y, restore(m, shift, axes)


def _apply(rule: _Rule, x, scale, bias, weights, residual, m: Moments, shift: Array) -> Array:
    if weights is not None:
        # Without data the bias. Plus zeros: of the sharding of the counts.
        scale = scale + jnp.zeros_like(m.count, scale.dtype)
        scale = jnp.where(m.count > 0, scale, jnp.zeros_like(scale))
    at = place(shift, m, rule.epsilon)
    center, a, c = _made_once(rule, at.center, *at.fold(scale, bias))
    y = transform(x.astype(shift.dtype) - center, a, c, residual)
    return (y if rule.activation is None else rule.activation(y)).astype(rule.dtype)


def _made_once(rule: _Rule, *vectors: Array) -> tuple[Array, ...]:
    """`vectors`, which XLA for CPUs would compute anew for every value that they meet."""
    if rule.problem.kernel is not None:
        return rule.problem.kernel.keep(*vectors)
    kinds = {(v.dtype, v.size, frozenset(varying(v))) for v in vectors}
    if is_explicitly_sharded(vectors[0]) or len(kinds) > 1:
        return vectors  # which do not go into one matrix
    return lax.platform_dependent(*vectors, cpu=_times_identity, default=lambda *vectors: vectors)


def _times_identity(*vectors: Array) -> tuple[Array, ...]:
    """`vectors`, by a matrix product: XLA for CPUs drops barriers, but fuses no products."""
    together = jnp.stack([v.reshape(-1) for v in vectors])
    identity = lax.optimization_barrier(jnp.eye(len(vectors), dtype=together.dtype))
    rows = lax.dot(identity, together, precision=lax.Precision.HIGHEST)
    return tuple(row.reshape(v.shape) for row, v in zip(rows, vectors, strict=True))


@_normalize.defjvp
def _normalize_jvp(rule: _Rule, primals, tangents):
    x, scale, bias, weights, residual = primals
    dx, dscale, dbias, _, dresidual = tangents  # weights are constants, and so is K
    # The two by themselves, so that whoever computes y again need not measure again.
    shift, m = named(differentiable_measure(rule.problem, x, weights))
    y = _apply(rule, x, scale, bias, weights, residual, m, shift)
    dy, dmean, dvar = _differential(rule)(
        (x, weights, _kept(rule, y, residual)),
        (m.count, place(shift, m, rule.epsilon), scale, bias),
        (dx, dscale, dbias, dresidual),
    )
    dm = Moments(jnp.zeros_like(m.count), dmean, dvar)
    return (y, m, shift), (dy, dm, jnp.zeros_like(shift))


@functools.lru_cache(maxsize=1024)
def _differential(rule: _Rule):
    """The linear map (dx, dscale, dbias, dresidual) -> (dy, dmean, dvar) of the docstring above.

    Cached, so that layers of one shape are traced once.
    """

    def differential(data, constants, tangents):
        x, weights, kept = data
        count, at, scale, bias = constants
        dtype = at.center.dtype
        dx, dscale, dbias, dresidual = jax.tree.map(lambda t: t.astype(dtype), tangents)
        dx = only_active(dx, weights)
        mean_dx, half_dvar = derivative(rule.problem, x, at.center, dx, count, at.rest, weights)
        a, c = _made_once(rule, *at.fold(scale, bias))
        # Where rstd is 0, as y is the bias, the sums over z may be infinite.
        mean_xhat_dx = jnp.where(at.rstd == 0, 0, at.rstd * half_dvar.astype(dtype))
        slope = jnp.where(at.rstd == 0, 0, at.rstd * (dscale - a * mean_xhat_dx))
        own = a * dx if dresidual is None else a * dx + dresidual
        others = dbias - a * mean_dx - at.rest * slope, slope
        dy = _through(rule, x, at.center, weights, kept, (a, c), own, others)
        return only_active(dy, weights).astype(rule.dtype), mean_dx, 2 * half_dvar

    # prevent_cse=False: the compiler may keep what it wants; only autodiff must not.
    return jax.checkpoint(differential, prevent_cse=False)


def _through(rule: _Rule, x, center, weights, kept, vectors, own, others) -> Array:
    """The derivative of the activation along own + u + z v, where u, v = others, z = x - center.

    `vectors` are (a, c) of the activation's input a z + c; `kept` is as `_kept` says.
    """
    activation, kernel = rule.activation, rule.problem.kernel
    is_relu = activation is jax.nn.relu
    if kernel is not None and (activation is None or is_relu):
        row = rule.problem.axes.squeeze
        gate = tuple(map(row, vectors)) if is_relu and kept is None else None
        u, v = map(row, others)
        dy = kernel.spread(x, row(center), u, v, own, gate=gate, dtype=rule.dtype)
        return dy if kept is None else jnp.where(kept > 0, dy, jnp.zeros_like(dy))
    z, (a, c) = shifted(x, center, weights), vectors
    # Backwards `v` gives the sum of z dy. Without the choice, which changes nothing, XLA for CPUs
    # takes z from memory there, where it has lain since the forward pass: as much as x again.
    u, v = others
    others = z * jnp.where(z != 0, v, jnp.zeros_like(v)) + u
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
