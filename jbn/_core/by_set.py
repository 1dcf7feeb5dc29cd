"""x, a set for each example -> the moments of each set, and y by those of the example's own set.

Each example has moments of its own, by one pass over x. Those of the examples of a set are then
pooled, and those of all devices by one collective for all sets. The derivative of the moments of
set s along dx is, with z = x - shift and E_s the mean over the examples of the set,

    dmean = E_s[dx],    dvar = 2 (E_s[z dx] - mean E_s[dx]),

which again needs one pass that sums over each example. y is one affine map for each example,
y = a z + c, whose a and c are those of its set.

`member`, [N, sets], says which example belongs to which set. An example of no set takes no part in
any moments, whatever it holds, and y is 0 there.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn._core.affine import (
    Affine,
    affine,
    displaced,
    harmless,
    location,
    transform,
    where_data,
)
from jbn._core.axes import Axes
from jbn._core.moments import measure
from jbn._core.plan import Inputs, Spec
from jbn._core.pooling import pool_instances, pool_sets
from jbn._core.running import RunningStats
from jbn._core.shift import accumulator
from jbn._core.types import Moments, ShiftedMoments, dot
from jbn._devices.named_axes import Scope, vary_as
from jbn._devices.placement import alongside, divide
from jbn._devices.sharded_arrays import join_sets
from jbn._sums.protocol import Batch
from jbn._sums.xla import XlaSums
from jbn._xla.checkpoint import checkpoint_policy, named
from jbn._xla.hints import recomputed, widened


class Sets(NamedTuple):
    """The set of each example, and the affine map of each set.

    Attributes:
      member: [N, sets], bool: whether an example belongs to a set.
      scale: [sets, C], or None for 1.
      bias: [sets, C], or None for 0.
    """

    member: Array
    scale: Array | None
    bias: Array | None


@functools.partial(jax.jit, static_argnums=0)
def normalized_by_set(spec: Spec, inputs: Inputs, sets: Sets) -> tuple[Array, ShiftedMoments]:
    """Computes y, and the moments of each set, [sets, C], which carry no gradient.

    `spec` has no groups, and `inputs` no scale and bias.
    """

    def run(inputs: Inputs, sets: Sets) -> tuple[Array, ShiftedMoments]:
        inputs = _widened(inputs)  # before all else, so that the gradient of x is rounded once
        m = _measure(spec, inputs.x, inputs.weights, sets.member)
        mean, rstd = location(m.mean, m.var, spec.epsilon)
        scale, bias = _affine_of(sets, rstd)
        if inputs.weights is not None:
            scale = where_data(m.count, scale)  # without data y is the bias
        at = affine(lax.stop_gradient(m.shift), mean, rstd, scale, bias)
        y = _transformed(spec, inputs, sets.member, at)
        return y, lax.stop_gradient(m)

    # The policy saves the moments of the sets; y and all that each example has is computed again.
    return jax.checkpoint(run, policy=checkpoint_policy, prevent_cse=True)(inputs, sets)


@functools.partial(jax.jit, static_argnums=0)
def moments_by_set(spec: Spec, inputs: Inputs, member: Array) -> ShiftedMoments:
    """Computes the moments of each set, [sets, C], without a gradient."""
    inputs = lax.stop_gradient(_widened(inputs))
    return _measure(spec, inputs.x, inputs.weights, member)


@functools.partial(jax.jit, static_argnums=0)
def infer_by_set(spec: Spec, inputs: Inputs, sets: Sets, stats: RunningStats) -> Array:
    """Computes y by the statistics of each example's set, [sets, C]."""

    def run(inputs: Inputs, sets: Sets, stats: RunningStats) -> Array:
        inputs = _widened(inputs._replace(weights=None))
        var = stats.var.astype(accumulator(stats.var.dtype))  # epsilon may be none of float16
        mean, rstd = location(stats.mean.astype(inputs.x.dtype), var, spec.epsilon)
        # The mean takes the place of the shift, and that of x - mean is 0.
        at = affine(mean, jnp.zeros_like(mean), rstd, *_affine_of(sets, rstd))
        return _transformed(spec, inputs, sets.member, at)

    return recomputed(run)(inputs, sets, stats)


def pooled_by_set(m: ShiftedMoments, sets: int) -> Moments:
    """Converts moments of x - shift, [groups * sets, C], to moments of x of each set, [sets, C]."""
    if len(m.mean) != sets:
        of = jnp.arange(len(m.mean)) % sets
        m = pool_sets(m, of[:, None] == jnp.arange(sets)[None])
    return Moments(m.count + jnp.zeros_like(m.var), m.mean + m.shift, m.var)


def _widened(inputs: Inputs) -> Inputs:
    """Widens x, and makes the residual harmless where masked."""
    x, weights, residual = inputs.x, inputs.weights, inputs.residual
    if residual is not None:
        residual = harmless(residual, residual, weights)
    return inputs._replace(x=x.astype(accumulator(x.dtype)), residual=residual)


def _only_of_sets(axes: Axes, values: Array, member: Array) -> Array:
    """Sets `values`, of x's shape, to 0 in examples of no set, in which x may hold anything.

    Not x is replaced, but what depends on it: a compiler would store the new x.
    """
    some = jnp.any(member, 1).reshape(-1, *(1 for _ in axes.features))
    some = alongside(axes.expand_examples(some), values)
    return jnp.where(some, values, jnp.zeros_like(values))


def _affine_of(sets: Sets, rstd: Array) -> tuple[Array, Array]:
    """Returns scale and bias of each set; 1 and 0 replace None."""
    _, scale, bias = sets
    return (
        jnp.ones_like(rstd) if scale is None else scale,
        jnp.zeros_like(rstd) if bias is None else bias,
    )


def _of_examples(axes: Axes, x: Array, member: Array, at: Affine) -> Affine:
    """Takes for each example the affine map of its set: [sets, C] -> broadcasts against x."""
    shift, mean, rstd, a, c = _chosen(x, member, *at)
    fields = (alongside(axes.expand_examples(v), x) for v in (shift, mean, rstd, a, c))
    return Affine(*fields)


def _chosen(x: Array, member: Array, *tables: Array) -> list[Array]:
    """Takes for each example the row of its set, [sets, C] -> [N, C]; 0 for those of no set.

    The tables are stacked: their transpose is a sum over the examples, of all devices, and one is
    enough.
    """
    dtype = jnp.result_type(*tables)
    stacked = vary_as(x, jnp.stack(jnp.broadcast_arrays(*(t.astype(dtype) for t in tables))))
    own = member.reshape(1, *member.shape, *(1 for _ in stacked.shape[2:]))
    rows = jnp.sum(jnp.where(own, stacked[:, None], jnp.zeros((), dtype)), 2)
    return [
        (row if jnp.iscomplexobj(t) else row.real).astype(t.dtype)
        for row, t in zip(rows, tables, strict=True)
    ]


def _transformed(spec: Spec, inputs: Inputs, member: Array, at: Affine) -> Array:
    """Computes y by the affine map of each example's set; `at` is [sets, C]."""
    x, weights, residual = inputs.x, inputs.weights, inputs.residual
    at = _of_examples(spec.axes, x, member, at)
    z = displaced(x, weights, at)
    y = _only_of_sets(spec.axes, transform(z, at.a, at.c), member)
    y = y if residual is None else lax.add(y, widened(residual, y.dtype))
    return (y if spec.activation is None else spec.activation(y)).astype(spec.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _measure(spec: Spec, x: Array, weights: Array | None, member: Array) -> ShiftedMoments:
    """Computes the moments of each set over the batch and the scope, [sets, C]."""
    each = spec.axes.split(len(member))
    weights = None if weights is None else divide(weights, each)
    own = jax.tree.map(each.squeeze, measure(Spec(each), divide(x, each), weights))
    own = own._replace(count=jnp.broadcast_to(own.count, (len(member), *own.count.shape[1:])))
    m = join_sets(spec.axes, own, member)
    return pool_instances(spec.over, m, True) if spec.over.names else m


@_measure.defjvp
def _measure_jvp(spec: Spec, primals, tangents):
    x, weights, member = primals
    # The moments have a name, by which the checkpoint policy saves them.
    m = named(_measure(spec, x, weights, member))
    each = spec.axes.split(len(member))
    dx = divide(_only_of_sets(spec.axes, alongside(tangents[0], x), member), each)
    weights = None if weights is None else divide(weights, each)
    shift, count = (each.unsqueeze(v) for v in _chosen(x, member, m.shift, m.count))
    count = jnp.where(count > 0, count, jnp.ones_like(count))
    batch = Batch(each, divide(x, each), weights)
    # Divided by the count of the set, they are shares of its means.
    shares = XlaSums().pair(batch, Scope(), shift, count, dx)
    mean_dx, mean_z_dx = spec.over.sum(tuple(_total(each.squeeze(s), member) for s in shares))
    mean = jnp.where(jnp.isfinite(m.mean), m.mean, jnp.zeros_like(m.mean))
    dvar = 2 * (mean_z_dx - dot(mean, mean_dx))
    return m, ShiftedMoments(jnp.zeros_like(m.shift), jnp.zeros_like(m.count), mean_dx, dvar)


def _total(values: Array, member: Array) -> Array:
    """Adds up the values of the examples of each set, [N, C] -> [sets, C]."""
    own = member.reshape(*member.shape, *(1 for _ in values.shape[1:]))
    return jnp.sum(jnp.where(own, values[:, None], jnp.zeros((), values.dtype)), 0)
