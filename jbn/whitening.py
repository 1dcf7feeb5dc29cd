"""Whitening: features without correlation and of variance 1, by the batch's own covariance.

Section 2 of the paper (arXiv 1502.03167) wants xhat = Cov^(-1/2) (x - E[x]) and takes each feature
by itself in its place, because of the cost. Here features are whitened jointly, all of them or in
groups of channels:

    x --covariance--> mean, Cov --method--> W = (Cov + epsilon I)^(-1/2) --> W (x - mean)
                          |
    WhiteningStats -------+---- update ----> WhiteningStats

`import jbn.whitening` needs JAX alone. `jbn.linen.Whitening` and `jbn.nnx.Whitening` are modules
over it.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.sharding import reshard
from jax.typing import ArrayLike, DTypeLike

from jbn._core import check
from jbn._core.affine import Activation, where_data
from jbn._core.axes import Axes, integer, resolve
from jbn._core.covariance import covariance, with_one
from jbn._core.deferral import Update, absorb, read, waits
from jbn._core.export import serializable
from jbn._core.inverse_root import multiply, newton_schulz_root, roots
from jbn._core.normalize import Params
from jbn._core.plan import Spec
from jbn._core.pooling import restore
from jbn._core.running import RunningStats, UpdateRule, ema
from jbn._core.shift import accumulator
from jbn._core.types import Moments
from jbn._devices import placement
from jbn._devices.named_axes import AxisName, scope, vary_as
from jbn._xla.hints import recomputed, widened

__all__ = [
    "Method",
    "WhiteningStats",
    "init_stats",
    "newton_schulz",
    "whiten",
    "whiten_inference",
    "zca",
]

# (covariance [..., s, s], epsilon) -> W, [..., s, s], with xhat = W (x - mean).
Method = Callable[[Array, float], Array]


class WhiteningStats(NamedTuple):
    """The statistics of the batches seen so far, for C features in G groups of s.

    Attributes:
      mean: [C], float32 or float64.
      cov: [G, s, s], float32 or float64: the covariance of each group.
      count: [G], float32 or float64: the number of batches that have entered each covariance.
    """

    mean: Array
    cov: Array
    count: Array  # pyright: ignore[reportIncompatibleMethodOverride]  (of tuple.count)


serializable(WhiteningStats)


def init_stats(
    features: int | Sequence[int], *, group_size: int | None = None, dtype: DTypeLike = jnp.float32
) -> WhiteningStats:
    """Makes mean 0, covariance I and count 0 for `features` features.

    >>> import jbn.whitening
    >>> stats = jbn.whitening.init_stats(4, group_size=2)
    >>> print(stats.mean.shape, stats.cov.shape, stats.count.shape)
    (4,) (2, 2, 2) (2,)

    Args:
      features: C, or a tuple for several feature axes.
      group_size: s, the number of features that are whitened together; None for all.
      dtype: float32 or float64.

    Raises:
      TypeError: dtype is not real, or narrower than float32.
      ValueError: group_size does not divide C.
    """
    dtype, shape = check.stats_dtype(dtype), check.number_of_features(features)
    _real(jnp.zeros((), dtype))
    groups, size = _divide(shape, group_size)
    eye = jnp.broadcast_to(jnp.eye(size, dtype=dtype), (groups, size, size))
    return WhiteningStats(jnp.zeros(shape, dtype), eye, jnp.zeros(groups, dtype))


def zca() -> Method:
    """Makes the method of zero-phase component analysis: W is the symmetric root, by eigenvalues.

        Cov + epsilon I = V diag(l) V^T,    W = V diag(1 / sqrt(l)) V^T

    Of all matrices that whiten, this one changes x least: E[|W (x - mean) - (x - mean)|^2] is
    smallest. Its derivative divides by sums of roots of eigenvalues, never by differences. So it is
    finite and right where eigenvalues coincide, for constant channels and for fewer examples than
    channels, as long as epsilon > 0. An eigenvalue below 1e-7 of the largest (2e-16 in float64) is
    a rounding error, and counts as that much. With epsilon = 0, directions without variance, up to
    rounding, are dropped: xhat is 0 along them, and no gradient goes through them.

    >>> import jax.numpy as jnp, jbn.whitening
    >>> jbn.whitening.zca()(jnp.diag(jnp.array([4.0, 0.0])), 0.0)
    Array([[0.5, 0. ],
           [0. , 0. ]], dtype=float32)
    """
    return _Zca()


def newton_schulz(iterations: int = 5) -> Method:
    """Makes the method of Newton-Schulz iterations (IterNorm, Huang et al. 2019, arXiv 1904.03441).

        A = (Cov + epsilon I) / t,  t = tr(Cov + epsilon I),  P_0 = I,
        P_k = (3 P_{k-1} - P_{k-1}^3 A) / 2,    W = P_T / sqrt(t)

    It multiplies matrices only, which suits accelerators, and comes close to `zca()` with many
    iterations. With few, directions of little variance keep less than 1: the variance of xhat along
    an eigenvector of eigenvalue l depends on the share a = l / t alone,

        a            1/4     1/16    1/64    1/256   1e-3    1e-4
        T = 5       1.000   0.966   0.586   0.201   0.056   0.006
        T = 7       1.000   1.000   0.983   0.668   0.251   0.029
        T = 10      1.000   1.000   1.000   1.000   0.952   0.280
        T = 15      1.000   1.000   1.000   1.000   1.000   1.000

    and a group of s features has shares of 1/s where they are white already: 5 iterations are for
    groups of up to 16 features. Directions without any variance are multiplied by 1.5^T / sqrt(t).

    >>> import jax.numpy as jnp, jbn.whitening
    >>> w = jbn.whitening.newton_schulz(5)(jnp.diag(jnp.array([4.0, 1.0])), 0.0)
    >>> [f"{rate:.2f}" for rate in jnp.diagonal(w)]
    ['0.50', '1.00']

    Args:
      iterations: T >= 1.

    Raises:
      ValueError: iterations is not an integer >= 1.
    """
    number = integer(iterations)
    if number is None or number < 1:
        raise ValueError(
            f"iterations must be an integer >= 1, such as newton_schulz(iterations=5); got "
            f"{iterations!r}."
        )
    return _NewtonSchulz(number)


@dataclasses.dataclass(frozen=True)
class _Zca:
    def __repr__(self) -> str:
        return "zca()"

    def __call__(self, cov: Array, epsilon: float) -> Array:
        return roots(cov, epsilon).inverse


@dataclasses.dataclass(frozen=True)
class _NewtonSchulz:
    iterations: int

    def __repr__(self) -> str:
        return f"newton_schulz({self.iterations})"

    def __call__(self, cov: Array, epsilon: float) -> Array:
        return newton_schulz_root(cov, epsilon, self.iterations)


def whiten(
    x: ArrayLike,
    params: Params,
    stats: WhiteningStats,
    *,
    group_size: int | None = None,
    method: Method = zca(),
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    update: UpdateRule = ema(0.99),
    mask: ArrayLike | None = None,
    weights: ArrayLike | None = None,
    axis_name: AxisName | None = None,
    axis_index_groups: Sequence[Sequence[int]] | None = None,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> tuple[Array, WhiteningStats]:
    """Whitening in training: by the mean and the covariance of the batch (section 2).

        xhat  = W (x - mean),    W = (Cov + epsilon I)^(-1/2),    mean, Cov of this batch
        y     = scale xhat + bias
        y     = activation(y + residual)                          if given
        stats = update(stats, (count, mean, Cov))

    >>> import jax, jax.numpy as jnp, jbn, jbn.whitening
    >>> x = jax.random.normal(jax.random.key(0), (64, 2)) @ jnp.array([[3.0, 1.0], [0.0, 1.0]])
    >>> params, stats = jbn.init_params(2), jbn.whitening.init_stats(2)
    >>> y, stats = jbn.whitening.whiten(x, params, stats, update=jbn.cumulative())
    >>> print(abs(jnp.cov(y.T, bias=True)).round(3))
    [[1. 0.]
     [0. 1.]]

    Args:
      x: [N, ..., C], real floating point. Half precision is reduced in float32.
      params: scale and bias, [C] each. A scale [C, C] is a coloring matrix, which multiplies xhat
        (Siarohin et al. 2018, arXiv 1806.00420); with several feature axes C is their product.
      stats: the running statistics so far, from `init_stats` with the same group_size.
      group_size: s, the number of consecutive features that are whitened together, a divisor of C.
        None: all. 1: each by itself, which is Batch Normalization.
      method: `zca()`, `newton_schulz(iterations)`, or any hashable function (covariance [G, s, s],
        epsilon) -> W, [G, s, s].
      axis: the feature axis or axes, C; several are taken as one, in the order of x's axes.
      epsilon: is added to the eigenvalues of the covariance, inside the root.
      update: how the batch enters the running statistics: `jbn.ema`, `jbn.cumulative`, or a
        function (RunningStats, Moments) -> RunningStats of means [G, s, 1], covariances [G, s, s]
        in the place of variances, and counts [G, 1, 1].
      mask: bool, of x's rank, broadcasts against x, and is the same for all features. False: the
        values take no part in the statistics, and are whitened by those of the others. They may be
        NaN: where one of a group is not finite, y is the bias in the whole group.
      weights: real and not negative, broadcasts like `mask`. Zero is the same as masked.
      axis_name: share statistics over these named axes (of vmap, pmap, shard_map). Under `jit` with
        sharded arrays leave it out.
      axis_index_groups: as in `jax.lax.psum`.
      activation: an elementwise function of JAX, such as `jax.nn.relu`.
      residual: of x's shape, is added before the activation.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, and the updated statistics, of the types of `stats`. y is differentiable in
      x, params and residual to any order; statistics carry no gradient. A group in which the batch
      has no data, or a NaN or infinity, keeps its old statistics; its y is the bias without data,
      and otherwise NaN. If a mask leaves a single example, its mean enters, and the old covariance
      stays. Only x is saved for backward, besides matrices.

      With n examples, at most n - 1 directions of a group have variance. With epsilon > 0 the
      others are multiplied by 1 / sqrt(epsilon); x has nothing along them but rounding errors. With
      epsilon = 0 see `zca`; `newton_schulz` is finite there.

    Raises:
      NameError: no vmap, pmap or shard_map binds axis_name.
      TypeError: x is not real floating point, stats are not WhiteningStats or narrower than
        float32, method is no function, or an argument is of another kind.
      ValueError: axis, group_size, params, stats, mask, weights or residual do not fit x's shape;
        the mask differs between features; epsilon < 0; or x has one value per feature.

    `group_size=16` is Decorrelated Batch Normalization (Huang et al. 2018, arXiv 1804.08450).
    """
    x = _real(check.floating(x))
    over = scope(axis_name, axis_index_groups)
    axes = resolve(x.shape, axis)
    check.reduction_axis(axes, over.names)
    if not over.names:
        check.several_values(axes)
    layout = _Layout(axes, *_divide(axes.feature_shape, group_size))
    old = _statistics(stats, layout, training=True)
    taking_part = check.participation(axes, mask, weights, accumulator(x.dtype))
    spec, inputs = _plan(layout, x, params, method, epsilon, activation, residual, dtype)
    if taking_part is not None:
        _same_for_all_features(taking_part, axes)
        taking_part = lax.stop_gradient(layout.split(placement.alongside(taking_part, x)))
    moments_of = Spec(layout.split_axes, over)
    y, m = _train(spec, moments_of, inputs, taking_part)
    if not waits(stats):
        check.as_replicated_as(old.mean, m.mean)
    new = absorb(update, old, m, given=stats, over=over, features=axes.feature_shape)
    return y, new if waits(stats) else layout.stats(new)


def whiten_inference(
    x: ArrayLike,
    params: Params,
    stats: WhiteningStats,
    *,
    method: Method = zca(),
    axis: int | Sequence[int] = -1,
    epsilon: float = 1e-5,
    activation: Activation | None = None,
    residual: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> Array:
    """Whitening at inference: by the running statistics.

        y = scale W (x - stats.mean) + bias,    W = (stats.cov + epsilon I)^(-1/2)
        y = activation(y + residual)            if given

    >>> import jax.numpy as jnp, jbn, jbn.whitening
    >>> stats = jbn.whitening.init_stats(2)._replace(cov=jnp.array([[[4.0, 0.0], [0.0, 1.0]]]))
    >>> jbn.whitening.whiten_inference(
    ...     jnp.array([[2.0, 2.0]]), jbn.init_params(2), stats, epsilon=0.0)
    Array([[1., 2.]], dtype=float32)

    Args:
      x: [..., C], real floating point. A single example is fine.
      params: as in training.
      stats: the running statistics, of any precision; cov has the groups.
      method: as in training.
      axis: the feature axis or axes, C.
      epsilon: as in training.
      activation: as in training.
      residual: as in training.
      dtype: of y; by default x's.

    Returns:
      y, of x's shape, differentiable in x, params and stats.

    Raises:
      TypeError: x is not real floating point, or an argument is of another kind.
      ValueError: axis, params, stats or residual do not fit x's shape, or epsilon < 0.
    """
    x = _real(check.floating(x))
    axes = resolve(x.shape, axis)
    shape = getattr(getattr(stats, "cov", None), "shape", ())
    size = shape[-1] if len(shape) == 3 else None
    layout = _Layout(axes, *_divide(axes.feature_shape, size, "stats.cov has groups of"))
    spec, inputs = _plan(layout, x, params, method, epsilon, activation, residual, dtype)
    return _infer(spec, inputs, _statistics(stats, layout, training=False))


class _Layout(NamedTuple):
    """The features of x in groups: [N, ..., C] <-> [N, ..., G, s, 1]. Static."""

    axes: Axes  # of x
    groups: int
    size: int

    @property
    def split_axes(self) -> Axes:
        """The axes of the result of `split`."""
        n = len(self.axes.reduction)
        sizes = (self.axes.shape[i] for i in self.axes.reduction)
        shape = (*sizes, self.groups, self.size, 1)
        return Axes(shape, (n, n + 1, n + 2), tuple(range(n)))

    def split(self, values: Array) -> Array:
        """Moves the features of x, or of a mask that has none, to the end, in groups."""
        n = len(self.axes.features)
        values = jnp.moveaxis(values, self.axes.features, range(-n, 0))
        none = values.shape[values.ndim - n :] != self.axes.feature_shape
        return placement.regroup(values, n, (1, 1, 1) if none else (self.groups, self.size, 1))

    def join(self, y: Array, sharding: Any) -> Array:
        """Inverts `split` for y: [N, ..., G, s]; `sharding` is that of x if it is explicit."""
        n = len(self.axes.features)
        y = placement.regroup(y, 2, self.axes.feature_shape)
        y = jnp.moveaxis(y, range(-n, 0), self.axes.features)
        return y if sharding is None else reshard(y, sharding)

    def stats(self, stats: RunningStats) -> WhiteningStats:
        """Converts means [G, s, 1] and counts [G, 1, 1] to the shapes of WhiteningStats."""
        mean = stats.mean.reshape(self.axes.feature_shape)
        return WhiteningStats(mean, stats.var, stats.count.reshape(self.groups))


class _Static(NamedTuple):
    """The static part of one call: hashable."""

    layout: _Layout
    method: Method
    epsilon: float
    activation: Activation | None
    dtype: np.dtype


class _Inputs(NamedTuple):
    """The arrays of one call; None for an argument that is not given."""

    x: Array
    scale: Array | None
    bias: Array | None
    residual: Array | None


class _Location(NamedTuple):
    """Statistics of the groups, by which x is whitened."""

    shift: Array  # [G, s, 1]
    mean: Array  # [G, s, 1], of x - shift
    matrix: Array  # [G, s, s]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _train(
    spec: _Static, of_moments: Spec, inputs: _Inputs, weights: Array | None
) -> tuple[Array, Moments]:
    sharding = _sharding(inputs.x)
    # One array for both, so that only one is saved for backward.
    inputs = inputs._replace(x=spec.layout.split(inputs.x))
    m = covariance(of_moments, inputs.x, weights)
    shift, count, mean, cov = (of_moments.axes.squeeze(v) for v in m)
    matrix = _matrix(spec, cov)
    if weights is not None:
        matrix = where_data(count, matrix)  # without data y is the bias
    y = _transform(spec, sharding, inputs, weights, _Location(shift, mean, matrix))
    return y, lax.stop_gradient(restore(m, of_moments.axes))


@functools.partial(jax.jit, static_argnums=0)
def _infer(spec: _Static, inputs: _Inputs, stats: RunningStats) -> Array:
    wide = accumulator(inputs.x.dtype)
    mean, cov = stats.mean.astype(wide), stats.var.astype(wide)
    at = _Location(mean, jnp.zeros_like(mean), _matrix(spec, cov))
    sharding = _sharding(inputs.x)
    inputs = inputs._replace(x=spec.layout.split(inputs.x))
    return _transform(spec, sharding, inputs, None, at)


def _sharding(x: Array) -> Any:
    """Returns the sharding of x over Explicit mesh axes, or None."""
    return jax.typeof(x).sharding if placement.is_explicitly_sharded(x) else None


def _matrix(spec: _Static, cov: Array) -> Array:
    matrix = spec.method(cov, spec.epsilon)
    if getattr(matrix, "shape", None) != cov.shape:
        raise ValueError(
            f"method must return a whitening matrix for each covariance, of shape {cov.shape}; "
            f"{spec.method!r} returned {getattr(matrix, 'shape', matrix)}."
        )
    return matrix


def _transform(
    spec: _Static, sharding: Any, inputs: _Inputs, weights: Array | None, at: _Location
) -> Array:
    """Computes activation(scale W (x - mean) + bias + residual), for x: [N, ..., G, s, 1].

    The result has the shape and the sharding of x before `split`. It is rematerialised, so that
    only x is saved for backward, in its own dtype.
    """

    def run(inputs: _Inputs, weights: Array | None, at: _Location) -> Array:
        y = spec.layout.join(_affine(spec.layout, inputs, weights, at), sharding)
        if inputs.residual is not None:
            y = y + widened(inputs.residual, y.dtype)
        return (y if spec.activation is None else spec.activation(y)).astype(spec.dtype)

    return recomputed(run)(inputs, weights, at)


def _affine(layout: _Layout, inputs: _Inputs, weights: Array | None, at: _Location) -> Array:
    """Computes scale W (x - mean) + bias, [N, ..., G, s], as one product with (x - shift, 1).

    So the backward pass needs one sum over the batch, that of the gradient of this matrix. A
    masked group that is not finite is multiplied by 0, and a further 1 adds the bias there.
    """
    x, dtype = inputs.x, at.matrix.dtype
    shift = vary_as(x, layout.split_axes.unsqueeze(at.shift))
    z = with_one(x, weights, shift)
    matrix = jnp.swapaxes(at.matrix, -1, -2)
    scale, bias = (None if p is None else p.astype(dtype) for p in (inputs.scale, inputs.bias))
    rows = (layout.groups, 1, layout.size)
    coloring = scale if scale is not None and scale.shape != layout.axes.feature_shape else None
    late = coloring is not None and layout.groups > 1
    if coloring is not None and not late:
        matrix = multiply(matrix, coloring.T)
    elif scale is not None and not late:
        matrix = matrix * scale.reshape(rows)
    offset = jnp.zeros(rows, dtype) if bias is None or late else bias.reshape(rows)
    parts = [matrix, offset - multiply(jnp.swapaxes(at.mean, -1, -2), matrix)]
    if weights is not None:
        unusable = z[..., -1:, :] == 0
        z = jnp.concatenate([z, unusable.astype(dtype)], axis=-2)
        parts.append(offset)
    y = _product(z[..., 0], vary_as(x, jnp.concatenate(parts, axis=-2)))
    if coloring is not None and late:
        y = placement.regroup(y, 2, (1, layout.groups * layout.size))
        y = _product(y, vary_as(x, coloring.T[None]))
        if bias is not None:
            y = y + vary_as(x, bias.reshape((1,) * (y.ndim - 1) + (-1,)))
    return y


def _product(z: Array, matrix: Array) -> Array:
    """Multiplies the rows of each group, [N, ..., G, s] and [G, s, t] -> [N, ..., G, t]."""
    if len(matrix) == 1:
        return multiply(z, matrix[0])
    return jnp.einsum("...gs,gst->...gt", z, matrix, precision=lax.Precision.HIGHEST)


# The checks of the arguments.


def _plan(
    layout: _Layout,
    x: Array,
    params: Any,
    method: Method,
    epsilon: float,
    activation: Activation | None,
    residual: ArrayLike | None,
    dtype: DTypeLike | None,
) -> tuple[_Static, _Inputs]:
    scale, bias = check.params(params)
    scale = None if scale is None else _scale(check.array(scale, "scale"), layout.axes)
    if bias is not None:
        bias = check.features("bias", bias, layout.axes)
    activation = check.activation(activation, x.shape, accumulator(x.dtype))
    residual = check.residual(residual, x)
    dtype = check.output_dtype(dtype, x, scale=scale, bias=bias, residual=residual)
    static = _Static(layout, _method(method), check.epsilon(epsilon), activation, dtype)
    return static, _Inputs(x, scale, bias, residual)


def _real(x: Array) -> Array:
    if jnp.iscomplexobj(x):
        raise TypeError(
            f"whitening is for real numbers; got {x.dtype}. Whiten real and imaginary parts as "
            f"features: jnp.concatenate([x.real, x.imag], axis=-1)."
        )
    return x


def _divide(shape: Sequence[int], size: int | None, what: str = "group_size=") -> tuple[int, int]:
    """Returns (number of groups, their size) for features of this shape."""
    features = math.prod(shape)
    if size is None:
        return 1, features
    number = integer(size)
    if number is None or number < 1:
        raise TypeError(
            f"group_size must be a number of features >= 1 that are whitened together, such as "
            f"group_size=16, or None for all; got {size!r}."
        )
    if features % number:
        fitting = [n for n in range(1, features + 1) if features % n == 0]
        raise ValueError(
            f"{what}{'' if what.endswith('=') else ' '}{number} does not divide the {features} "
            f"features: take one of {', '.join(map(str, fitting))}."
        )
    return features // number, number


def _method(method: Any) -> Any:
    if method is zca or method is newton_schulz:
        raise TypeError(
            f"method is what {method.__name__} returns: write jbn.whitening.{method.__name__}()."
        )
    if not callable(method):
        raise TypeError(
            f"method must be jbn.whitening.zca(), newton_schulz(iterations) or a function "
            f"(covariance, epsilon) -> W; got {method!r}."
        )
    try:
        hash(method)
    except TypeError:
        raise TypeError(f"method must be hashable, because it is static; got {method!r}.") from None
    return method


def _scale(scale: Array, axes: Axes) -> Array:
    features = math.prod(axes.feature_shape)
    if scale.shape in (axes.feature_shape, (features, features)):
        return scale
    raise ValueError(
        f"scale has shape {scale.shape}, but x, of shape {axes.shape}, needs "
        f"{axes.feature_shape}, or {(features, features)} for a coloring matrix. Pass axis= if the "
        f"features lie elsewhere."
    )


def _same_for_all_features(values: Array, axes: Axes) -> None:
    if any(values.shape[i] != 1 for i in axes.features):
        raise ValueError(
            f"mask or weights of shape {values.shape} differ between features, but a covariance "
            f"is of whole examples. Give one value for each position, of shape "
            f"{axes.per_position}."
        )


def _statistics(stats: Any, layout: _Layout, *, training: bool) -> RunningStats:
    """Checks WhiteningStats, and converts them to means [G, s, 1] and counts [G, 1, 1]."""
    if tuple(getattr(stats, "_fields", ())) != WhiteningStats._fields:
        raise TypeError(
            f"stats must be WhiteningStats(mean, cov, count), such as "
            f"jbn.whitening.init_stats(C, group_size=...); got {type(stats).__name__}."
        )
    arrays = read(stats)
    if any(isinstance(cell, Update) for cell in stats):  # of an earlier call in the same step
        return arrays
    stats = WhiteningStats(*arrays)
    groups, size = layout.groups, layout.size
    shapes = {
        "mean": layout.axes.feature_shape,
        "cov": (groups, size, size),
        "count": (groups,),
    }
    checked = []
    for name, shape in shapes.items():
        value = check.array(getattr(stats, name), f"stats.{name}")
        if value.shape != shape:
            raise ValueError(
                f"stats.{name} has shape {value.shape}, but x, of shape {layout.axes.shape}, needs "
                f"{shape} for {groups} groups of {size} features. Write "
                f"jbn.whitening.init_stats({math.prod(layout.axes.feature_shape)}, "
                f"group_size={size}), with the same group_size as here."
            )
        if training or name != "count":
            check.real_statistic(f"stats.{name}", value, training=training)
        checked.append(value)
    mean, cov, count = checked
    return RunningStats(mean.reshape(groups, size, 1), cov, count.reshape(groups, 1, 1))
