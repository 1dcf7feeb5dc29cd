"""Compares the library with float64 on random inputs, in random modes of execution.

    python -m tests.fuzz --minutes 3               # a new seed, which is printed
    python -m tests.fuzz --cases 500 --seed 7      # the same 500 cases every time
    python -m tests.fuzz --run 'law=pool,seed=3'   # one case again, from the line of its failure
    python -m tests.fuzz --run ... --shrink        # the same, made simpler as long as it fails

An error is a failure if it exceeds ten times that of two float32 passes over the data, compiled by
the same compiler and differentiated by JAX (`textbook`), plus a few roundings of the terms of the
result. The truth comes from `oracle`, or for higher derivatives from `textbook` in float64.

The JBN_NATIVE variable has the same effect as for the library: with 1 the C++ kernel is compared.
"""

import argparse
import collections
import contextlib
import functools
import math
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbn
import tests.conftest  # noqa: F401  eight devices, strict dtypes and ranks
from tests import executions, fuzz_cases, oracle, textbook, tolerance
from tests.fuzz_cases import Case, Data

FACTOR = 10  # times the error of two float32 passes
ROUNDINGS = tolerance.tol("float32", 0)["atol"] / tolerance.eps("float32")
REPEATS = 8  # cases for each program
COMPILED = 32  # programs that are kept


class Failure(NamedTuple):
    """A case that failed, and why."""

    case: Case
    kind: str
    message: str


class Compared(NamedTuple):
    """One result of the library, the truth, that of two float32 passes, and the size of its terms.

    All arrays have the shape [k, ...]. Each of the k rows, such as that of a feature, is judged on
    its own.
    """

    name: str
    actual: np.ndarray
    truth: np.ndarray
    base: np.ndarray
    size: np.ndarray  # the magnitude of the terms that the result is the sum of
    dtype: str  # of the result
    precision: float  # eps of the computation
    summed: int = 0  # terms of the sum that the result is, if `size` is that of the result


def judge(c: Compared) -> str | None:
    """Returns what is wrong with the result, or None."""
    size = c.size + np.finfo(np.float32).tiny

    def error(values):
        # Rounding to the result's own dtype is no error: half an ulp, or half the smallest number.
        info = jnp.finfo(c.dtype)
        rounding = 0.505 * float(info.eps) * np.abs(c.truth) + float(info.smallest_subnormal)
        values = np.maximum(np.abs(values - c.truth) - rounding, 0) / size
        values = np.where(np.isfinite(values), values, np.inf)
        # A value beyond the range of the result's dtype may become infinite or the largest number.
        values = np.where(np.abs(c.truth) < 0.99 * float(info.max), values, 0.0)
        return values.reshape(len(values), -1)

    ours, base = error(c.actual), error(c.base).max(1, initial=0)
    # Where two passes fail, only the roundings are allowed.
    base = np.where(np.isfinite(base), base, 0.0)
    # Two passes may be exact by chance in one feature, but not in half of them: hence the median.
    # The oracle computes in float64 too, and NumPy adds up several axes term by term: for float64
    # its own error was seen to be 26 eps, from 160 terms.
    roundings = ROUNDINGS if c.precision > 1e-10 else 8 * ROUNDINGS
    roundings += c.summed**0.5  # see `tolerance`, 2.
    bound = FACTOR * np.maximum(base, np.median(base)) + roundings * c.precision
    at = np.unravel_index(np.argmax(ours / bound[:, None]), ours.shape)
    if ours[at] <= bound[at[0]]:
        return None
    actual, truth = (v.reshape(ours.shape)[at] for v in (c.actual, c.truth))
    return (
        f"{c.name}{list(map(int, at))} is {actual:.9g} for {truth:.9g}, off by {ours[at]:.1e} of "
        f"its terms; allowed are {bound[at[0]]:.1e} (two passes: {base[at[0]]:.1e})"
    )


# --- How a case is run -------------------------------------------------------------------------


class Activation(NamedTuple):
    """An activation and, in NumPy, its values and its slope."""

    function: Callable | None
    values: Callable
    slope: Callable


def _sigmoid(x):
    return 0.5 * (1 + np.tanh(x / 2))


ACTIVATIONS = {
    "none": Activation(None, lambda x: x, np.ones_like),
    "relu": Activation(jax.nn.relu, lambda x: np.maximum(x, 0), lambda x: 1.0 * (x > 0)),
    "tanh": Activation(jnp.tanh, np.tanh, lambda x: 1 - np.tanh(x) ** 2),
    "silu": Activation(
        jax.nn.silu,
        lambda x: x * _sigmoid(x),
        lambda x: _sigmoid(x) * (1 + x * (1 - _sigmoid(x))),
    ),
}
UPDATES = {
    "ema": (jbn.ema(0.9), {"decay": 0.9}),
    "debias": (jbn.ema(0.9, debias=True), {"decay": 0.9, "debias": True}),
    "unbiased": (jbn.ema(0.9, unbiased=True), {"decay": 0.9, "unbiased": True}),
    "cumulative": (jbn.cumulative(), {}),
    "cumulative_unbiased": (jbn.cumulative(unbiased=True), {"unbiased": True}),
    "last": (jbn.ema(0.0), {"decay": 0.0}),
}


def _examples(f, params, rows):
    """Runs an instance of the named axis for each example, which then has no batch axis."""
    instance = lambda params, row: f(params, row, executions.AXIS)  # noqa: E731
    per_row, shared = jax.vmap(instance, axis_name=executions.AXIS, in_axes=(None, 0))(params, rows)
    return per_row, shared


WHOLE = executions.WHOLE
MODES = {mode.name: mode for mode in executions.ALL} | {
    "eager": WHOLE,
    "one_device": WHOLE,
    "jit": WHOLE,
    "jit_sharded": next(mode for mode in executions.GLOBAL if mode.name == "jit"),
    "examples": executions.Mode("examples", _examples),
}


def run(case: Case, program: Callable, params, rows):
    """Runs program(params, rows) in the case's mode; returns NumPy arrays of float64."""
    mode = MODES[case.mode]
    if case.mode == "eager":
        result = program(params, rows)
    elif case.mode == "one_device":
        kind = (jax.sharding.AxisType.Auto,)
        with jax.set_mesh(jax.make_mesh((1,), ("only",), kind, devices=jax.devices()[:1])):
            result = jax.jit(program)(params, rows)
    elif mode is WHOLE:
        result = jax.jit(program)(params, rows)
    else:
        result = mode.run(program, params, rows)
    return to_numpy(result)


def to_numpy(tree):
    return jax.tree.map(lambda v: np.asarray(v).astype(np.float64), tree)


def types(case: Case):
    """Enables 64-bit types where the case needs them."""
    return jax.enable_x64(True) if case.dtype == "float64" else contextlib.nullcontext()


def order(case: Case) -> np.ndarray:
    """Returns the order of the examples in which groups are consecutive over all instances."""
    rows = np.arange(case.shape[case.reduced[0]])
    if case.groups == 1 or not fuzz_cases.named(case.mode):
        return rows
    # An instance divides its own share, so the first group has the first part of every share.
    return rows.reshape(executions.INSTANCES, case.groups, -1).swapaxes(0, 1).ravel()


def in_order(case: Case, values):
    """Puts an array of x's shape into that order; leaves any other array unchanged."""
    if np.shape(values) != case.shape:
        return values
    return np.take(values, order(case), case.reduced[0])


def layer(case: Case, x, scale, bias, residual, rows, axis_name):
    """Calls jbn.normalize as the case says."""
    return jbn.normalize(
        x,
        scale,
        bias,
        axis=case.axis,
        epsilon=case.epsilon,
        mask=rows.get("mask"),
        weights=rows.get("weights"),
        axis_name=axis_name,
        groups=None if case.groups == 1 else case.groups,
        activation=ACTIVATIONS[case.activation].function,
        residual=residual,
    )


def ours(case: Case, rows):
    """Returns the library's function (x, scale, bias, residual) -> ((y, mean, var), count)."""

    def outputs(args):
        x, scale, bias, residual = args
        given = {**rows, "x": x}
        if residual is not None:
            given["residual"] = residual

        def instance(params, rows, axis_name):
            at = rows["x"], *params, rows.get("residual"), rows
            return layer(case, *at, axis_name)

        y, m = MODES[case.mode].execute(instance, (scale, bias), given)
        count, mean, var = (v[0] for v in m)  # the same for all instances
        stats = tuple(v.reshape(case.groups, *case.sizes) for v in (mean, var))
        return (y, *stats), count

    return outputs


def two_passes(case: Case, w):
    """Returns the same function by the textbook, in x's accumulator and without the count."""

    def outputs(args):
        x, scale, bias, residual = args
        wide = tolerance.accumulator(x.dtype)
        devices = executions.INSTANCES if case.mode in fuzz_cases.SPLIT else 1
        y, mean, var = textbook.normalize(
            x.astype(wide),
            scale,
            bias,
            axis=case.axis,
            epsilon=case.epsilon,
            w=None if w is None else w.astype(wide),
            groups=case.groups,
            devices=math.gcd(devices, x.shape[case.reduced[0]] // case.groups),
        )
        return finish(case, y, residual, x.dtype), mean, var

    return outputs


def finish(case: Case, y, residual, dtype):
    """Computes activation(y + residual) in the dtype."""
    y = y if residual is None else y + residual.astype(y.dtype)
    activation = ACTIVATIONS[case.activation].function
    return (y if activation is None else activation(y)).astype(dtype)


def weighted_sum(cotangents, values):
    """Returns the scalar whose gradient is that of `values` along `cotangents`."""
    pairs = zip(jax.tree.leaves(cotangents), jax.tree.leaves(values), strict=True)
    wide = jnp.float64 if jax.config.jax_enable_x64 else jnp.float32
    return sum((c.astype(wide) * v.astype(wide)).sum() for c, v in pairs)


def differentiated(f, order: str, directions, cotangents):
    """Differentiates f, a function args -> outputs, by the letters of `order`, the last one first.

    The letter f is the derivative along a direction. The letter r is the gradient of a weighted
    sum: outputs are weighted by the cotangents, values of the structure of args by a direction.
    """
    like_args = False
    for letter, along in zip(reversed(order), directions, strict=False):
        if letter == "f":
            f = functools.partial(_forward, f, along)
        else:
            f = functools.partial(_reverse, f, along if like_args else cotangents)
            like_args = True
    return f


def _forward(f, along, args):
    return jax.jvp(f, (args,), (along,))[1]


def _reverse(f, cotangents, args):
    return jax.grad(lambda args: weighted_sum(cotangents, f(args)))(args)


# --- The laws ----------------------------------------------------------------------------------


def per_part(case: Case, values: np.ndarray) -> np.ndarray:
    """Reshapes [x.shape] to [groups * C, n], a row for each group and feature."""
    parts = np.split(values, case.groups, case.reduced[0])
    rows = [np.moveaxis(p, case.features, range(len(case.features))) for p in parts]
    return np.concatenate([r.reshape(int(np.prod(case.sizes)), -1) for r in rows])


def flat(values: np.ndarray) -> np.ndarray:
    """Flattens [groups, *C] or [*C] to [groups * C]."""
    return np.asarray(values, np.float64).reshape(-1)


@functools.lru_cache(COMPILED)
def _normalize_program(case: Case):
    def program(params, rows):
        def loss(args):
            outputs, count = ours(case, rows)(args)
            return weighted_sum((rows["dy"], *params[2:]), outputs), (outputs, count)

        args = rows["x"], *params[:2], rows.get("residual")
        return jax.grad(loss, has_aux=True)(args)

    return program


@functools.lru_cache(COMPILED)
def _two_passes_program(case: Case):
    @jax.jit
    def program(args, w, cotangents):
        def loss(args):
            outputs = two_passes(case, w)(args)
            return weighted_sum(cotangents, outputs), outputs

        return jax.grad(loss, has_aux=True)(args)

    return program


def law_normalize(case: Case, data: Data) -> Iterator[Compared]:
    """Compares y, the moments and first derivatives of jbn.normalize with the oracle."""
    t = truth(case, data)
    data = t.data
    params = data.scale, data.bias, data.dmean, data.dvar
    grads, ((y, mean, var), count) = run(case, _normalize_program(case.program), params, data.rows)
    dx, dscale, dbias, dresidual = grads
    sort = functools.partial(in_order, case)
    args = sort(data.rows["x"]), data.scale, data.bias, sort(data.rows.get("residual"))
    cotangents = sort(data.rows["dy"]), data.dmean, data.dvar
    w = sort(data.w)
    base_grads, base = to_numpy(_two_passes_program(case.program)(args, w, cotangents))
    eps = tolerance.eps(tolerance.accumulator(case.dtype))
    wide = str(np.dtype(tolerance.accumulator(case.dtype)))

    def array(name, actual, base):
        rows = (per_part(case, v) for v in (sort(actual), t.values[name], base, t.sizes[name]))
        rows = [v[t.sound] for v in rows]
        return Compared(name, *rows, case.dtype, eps)

    def vector(name, actual, base):
        rows = [flat(v) for v in (actual, t.values[name], base, t.sizes[name])]
        # Parameters have one gradient for all groups.
        keep = t.sound if len(rows[1]) == len(t.sound) else t.sound.reshape(case.groups, -1).all(0)
        return Compared(name, *(v[keep] for v in rows), wide, eps)

    yield array("y", y, base[0])
    yield vector("mean", mean, base[1])
    yield vector("var", var, base[2])
    yield _counts("count", np.broadcast_to(count, t.count.shape), t.count, case)
    yield array("dx", dx, base_grads[0])
    if data.scale is not None:
        yield vector("dscale", dscale, base_grads[1])
    if data.bias is not None:
        yield vector("dbias", dbias, base_grads[2])
    if case.residual:
        yield array("dresidual", dresidual, base_grads[3])


def near_zero(case: Case, x: np.ndarray, w: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Returns (x - shift, shift) in float64; the shift, [C], is a value of x that takes part.

    Only the mean depends on the shift, so float64 x far from zero is no harder for the references
    than float32 x. The difference is rounded by at most half an ulp of itself.
    """
    x = np.asarray(x, np.float64)
    some = np.ones(x.shape, bool) if w is None else w > 0
    rows = np.moveaxis(np.where(some, x, np.inf), case.reduced, range(len(case.reduced)))
    rows = np.sort(rows.reshape(-1, *case.sizes), axis=0)
    count = some.sum(case.reduced)
    if not len(rows):
        return x, np.zeros(case.sizes)
    k = np.take_along_axis(rows, np.maximum(count - 1, 0)[None] // 2, axis=0)[0]
    k = np.where(count > 0, k, 0.0)
    return x - np.expand_dims(k, case.reduced), k


def moments(case: Case, x: np.ndarray, w: np.ndarray | None) -> oracle.Moments:
    """Returns the oracle's moments of x."""
    z, k = near_zero(case, x, w)
    m = oracle.moments(z, case.axis, weights=w)
    return m._replace(mean=np.where(m.count > 0, m.mean + k, 0.0))


def _counts(name: str, actual, truth, case: Case) -> Compared:
    """Compares sums of weights; in float64 the oracle sums one by one and has an error, too."""
    eps = tolerance.eps(tolerance.accumulator(case.dtype))
    base = truth * (1 + np.prod(case.shape) ** 0.5 * tolerance.eps("float64"))
    values = map(flat, (actual, truth, base, truth))
    return Compared(name, *values, str(np.dtype(tolerance.accumulator(case.dtype))), eps)


class Truth(NamedTuple):
    """The oracle's results, with the groups consecutive, and the sizes of their terms."""

    data: Data  # with no cotangent where an activation has a kink
    values: dict[str, np.ndarray]
    sizes: dict[str, np.ndarray]
    count: np.ndarray  # [groups, *C]
    sound: np.ndarray  # [groups * C]: whether float32 has the range for it


def truth(case: Case, data: Data) -> Truth:
    """Computes all results of `law_normalize` by the oracle, group by group."""
    split = lambda v: np.split(in_order(case, v), case.groups, case.reduced[0])  # noqa: E731
    x = split(data.rows["x"])
    w = split(np.ones(case.shape) if data.w is None else data.w)
    dy = split(np.asarray(data.rows["dy"], np.float64))
    residual = split(np.asarray(data.rows.get("residual", np.zeros(case.shape)), np.float64))
    act = ACTIVATIONS[case.activation]
    given = {"axis": case.axis, "epsilon": case.epsilon}
    found = collections.defaultdict(list)
    sizes = collections.defaultdict(list)
    wide = functools.partial(np.expand_dims, axis=case.reduced)
    scale = np.ones(case.sizes) if data.scale is None else np.asarray(data.scale, np.float64)
    bias = np.zeros(case.sizes) if data.bias is None else np.asarray(data.bias, np.float64)
    kept, sound = [], []
    for k in range(case.groups):
        z, center = near_zero(case, x[k], w[k])
        pre, m = oracle.normalize(z, scale, bias, weights=w[k], **given)
        std = np.sqrt(m.var + case.epsilon)
        std = np.where(std > 0, std, 1.0)
        xhat = np.abs(oracle.normalize(z, weights=w[k], **given)[0])
        size = wide(np.abs(scale)) * (1 + xhat) + wide(np.abs(bias)) + np.abs(residual[k])
        pre = pre + residual[k]
        # A value of tiny weight may be so far away that float32 has no digits left for it.
        far = np.where(w[k] > 0, xhat, 0).max(case.reduced)
        sound.append(_sound(case, m.var) & (far < 1e6))
        near_kink = (act.function is jax.nn.relu) & (np.abs(pre) < 1e-2 * size)
        dy[k] = np.where(near_kink, 0, dy[k])
        kept.append(~near_kink)
        dpre = dy[k] * act.slope(pre)
        dmean, dvar = (np.asarray(v[k], np.float64) for v in (data.dmean, data.dvar))
        dx, dscale, dbias = oracle.vjp(z, scale, bias, dpre, dmean, dvar, weights=w[k], **given)
        p = w[k] / wide(np.where(m.count > 0, m.count, 1.0))
        a, each = wide(np.abs(scale) / std), np.abs(dy[k])  # slopes are at most about 1
        sums = [wide(v.sum(case.reduced)) for v in (each, each * xhat)]
        finite = np.where(w[k] > 0, np.asarray(x[k], np.float64), 0.0)
        rms = np.sqrt((p * finite**2).sum(case.reduced))
        add = lambda into, **named: [into[n].append(v) for n, v in named.items()]  # noqa: E731
        mean = np.where(m.count > 0, m.mean + center, 0.0)
        add(found, y=act.values(pre), mean=mean, var=m.var, dx=dx)
        add(found, dscale=dscale, dbias=dbias, dresidual=dpre, count=m.count)
        add(sizes, y=size, mean=rms, var=m.var, dresidual=each)
        add(sizes, dscale=sums[1].reshape(case.sizes), dbias=sums[0].reshape(case.sizes))
        add(
            sizes,
            dx=a * (each + p * (sums[0] + (1 + xhat) * sums[1]))
            + p * (wide(np.abs(dmean)) + 2 * (1 + xhat) * wide(std * np.abs(dvar))),
        )
    for per_row in ("y", "dx", "dresidual"):
        for d in (found, sizes):
            d[per_row] = np.concatenate(d[per_row], case.reduced[0])
    for summed in ("dscale", "dbias"):
        for d in (found, sizes):
            d[summed] = np.sum(d[summed], axis=0)
    rows = dict(data.rows)
    back = np.argsort(order(case))
    kink_free = np.take(np.concatenate(kept, case.reduced[0]), back, case.reduced[0])
    rows["dy"] = np.where(kink_free, rows["dy"], np.zeros_like(rows["dy"]))
    values = {name: np.asarray(v) for name, v in found.items()}
    sizes = {name: np.asarray(v) for name, v in sizes.items()}
    count = values.pop("count")
    return Truth(data._replace(rows=rows), values, sizes, count, np.concatenate(sound, None))


def _sound(case: Case, var: np.ndarray) -> np.ndarray:
    """Tells where float32 can hold the variance, and the squares that it comes from.

    Elsewhere the library promises something else (y is the bias), and two passes promise nothing.
    Without epsilon a variance of 0 has no reciprocal.
    """
    least = 1e-28 if case.epsilon == 0 else 0.0
    return (var >= least) & ((var == 0) | (var > 1e-30)) & (var < 1e30)


@functools.lru_cache(COMPILED)
def _derivatives_program(case: Case):
    def program(params, rows):
        scale, bias, directions, cotangents = params
        args = rows["x"], scale, bias, rows.get("residual")
        f = lambda args: ours(case, rows)(args)[0]  # noqa: E731
        return differentiated(f, case.order, directions, cotangents)(args)

    return program


@functools.lru_cache(2 * COMPILED)
def _textbook_program(case: Case, wide: bool):
    del wide  # a key of the cache: with 64-bit types jit makes another program

    @jax.jit
    def program(args, w, directions, cotangents):
        f = two_passes(case, w) if case.law == "derivatives" else infer_by_textbook(case)
        return differentiated(f, case.order, directions, cotangents)(args)

    return program


def law_derivatives(case: Case, data: Data) -> Iterator[Compared]:
    """Compares derivatives of jbn.normalize of orders 1 to 3 with the textbook's in float64."""
    if case.junk == "huge" and case.order != "r":
        return  # at x = 1e38 float32 has no range for xhat, nor for what other orders need of it
    t = truth(case, data)
    data, var = t.data, t.values["var"]
    if data.w is not None and len(case.order) > 1:
        # A masked value far from a channel of one value has an xhat of 1e5 and more, and its higher
        # derivatives are differences of terms xhat rstd^n. Two passes are exact there by chance.
        finite = data.rows["x"][np.isfinite(data.rows["x"])].astype(np.float64)
        if len(finite) and np.ptp(finite) > 1e3 * np.sqrt(np.min(var) + case.epsilon):
            return
    rng = np.random.default_rng(case.seed + 1)
    args = data.rows["x"], data.scale, data.bias, data.rows.get("residual")
    keep = data.w > 0 if data.w is not None and case.junk == "huge" else None
    directions = _directions(rng, args, len(case.order), keep)
    cotangents = data.rows["dy"], data.dmean, data.dvar
    program = _derivatives_program(case.program)
    actual = run(case, program, (data.scale, data.bias, directions, cotangents), data.rows)
    sort = functools.partial(jax.tree.map, functools.partial(in_order, case))
    at = sort(args), in_order(case, data.w), sort(directions), sort(cotangents)
    if t.sound.all():
        yield from _against_textbook(case, sort(actual), at, var)


def _directions(rng, args, n, keep):
    """Draws n random directions in the space of args; they are 0 in x where `keep` is false."""

    def one(i, v):
        along = rng.normal(size=v.shape)
        return (along if i or keep is None else np.where(keep, along, 0.0)).astype(v.dtype)

    return [tuple(None if v is None else one(i, v) for i, v in enumerate(args)) for _ in range(n)]


def _against_textbook(case: Case, actual, at, var) -> Iterator[Compared]:
    """Compares derivatives of the case's order; var, [groups, *C], gives the size of terms."""
    (x, *rest), w, *others = at
    z, k = near_zero(case, x, w)
    if case.law == "inference":
        rest[3] = np.asarray(rest[3], np.float64) - k
    shifted = (z, *rest), w, *others
    as_type = lambda t: functools.partial(jax.tree.map, lambda v: np.asarray(v).astype(t))  # noqa: E731
    program = _textbook_program(case.program, True)
    with jax.enable_x64(True):
        expected, plain = (to_numpy(program(*as_type(np.float64)(v))) for v in (shifted, at))
    base = _textbook_program(case.program, False)(*as_type(np.float32)(at))
    eps = tolerance.eps(tolerance.accumulator(case.dtype))
    # A result may be a small difference of terms. Each derivative, except one in scale or bias,
    # divides once more by the standard deviation, and it doubles the number of terms. The variance
    # is an output, too.
    order, rstd = len(case.order), (np.maximum(var, 1e-30) + case.epsilon) ** -0.5
    size = 2**order * (rstd**order + rstd ** (order - 1) + var * rstd**order)
    names: Iterable[str] = ("y", "mean", "var")
    if "r" in case.order:  # gradients
        names = ("x", "scale", "bias", "residual", "mean", "var")
        names = (name for name, v in zip(names, at[0], strict=False) if v is not None)

    def rows(values):
        if values.shape == case.shape:
            return per_part(case, values)
        return values.reshape(-1, int(np.prod(case.sizes))).T

    leaves = (jax.tree.leaves(tree) for tree in (actual, expected, to_numpy(base), plain))
    results = enumerate(zip(*leaves, strict=True))
    for name, (i, (mine, true, two, wide)) in zip(names, results, strict=False):
        if case.dtype == "float64":  # two passes in float64, and in float32 at float64's scale
            two = np.abs(two - true) * (eps / tolerance.eps("float32"))
            two = true + np.maximum(two, np.abs(wide - true))
        mine, true, two = map(rows, (mine, true, two))
        # In these results alone, a curved activation adds terms without a standard deviation.
        curved = case.activation in ("tanh", "silu") and name in ("y", "scale", "bias", "residual")
        sizes = size + 2**order * curved
        terms = flat(sizes) if len(true) == size.size else rows(sizes).max(1)
        terms = np.abs(true).max(1, initial=0, keepdims=True) + terms[:, None]
        n = 0 if mine.size == x.size else x.size // len(mine)
        yield Compared(f"{case.order}[{i}]", mine, true, two, terms, case.dtype, eps, n)


def infer(case: Case):
    def outputs(args):
        x, scale, bias, residual, mean, var = args
        return jbn.batch_norm_inference(
            x,
            jbn.Params(scale, bias),
            jbn.RunningStats(mean, var, jnp.ones_like(var)),
            axis=case.axis,
            epsilon=case.epsilon,
            activation=ACTIVATIONS[case.activation].function,
            residual=residual,
        )

    return outputs


def infer_by_textbook(case: Case):
    def outputs(args):
        x, scale, bias, residual, mean, var = args
        y = textbook.inference(
            x.astype(mean.dtype), scale, bias, mean, var, axis=case.axis, epsilon=case.epsilon
        )
        return finish(case, y, residual, x.dtype)

    return outputs


@functools.lru_cache(COMPILED)
def _inference_program(case: Case):
    @jax.jit
    def program(args, directions, cotangents):
        return differentiated(infer(case), case.order, directions, cotangents)(args)

    return program


def law_inference(case: Case, data: Data) -> Iterator[Compared]:
    """Compares jbn.batch_norm_inference and its derivatives, by statistics near the data's."""
    rng = np.random.default_rng(case.seed + 1)
    x, wide = data.rows["x"], tolerance.accumulator(case.dtype)
    m = moments(case, x, None)
    std = np.sqrt(m.var) + 0.1 * case.std
    mean = (m.mean + 0.1 * std * rng.normal(size=case.sizes)).astype(wide)
    var = (std**2 * rng.uniform(0.5, 2, case.sizes)).astype(wide)
    args = x, data.scale, data.bias, data.rows.get("residual"), mean, var
    directions = _directions(rng, args, len(case.order), None)
    pre = oracle.affine(x, mean, var, data.scale, data.bias, case.axis, case.epsilon)
    pre = pre + np.asarray(data.rows.get("residual", 0.0), np.float64)
    dy = data.rows["dy"]
    if case.activation == "relu":
        dy = np.where(np.abs(pre) < 1e-2 * (1 + np.abs(pre)), np.zeros_like(dy), dy)
    actual = to_numpy(_inference_program(case.program)(args, directions, (dy,)))
    if _sound(case, np.asarray(var, np.float64)).all():
        at = args, None, directions, (dy,)
        yield from _against_textbook(case, actual, at, var[None].astype(np.float64))


@functools.lru_cache(COMPILED)
def _running_program(case: Case):
    update = UPDATES[case.rule][0]

    def program(params, rows):
        def instance(params, rows, axis_name):
            return jbn.batch_norm(
                rows["x"],
                *params,
                axis=case.axis,
                epsilon=case.epsilon,
                update=update,
                mask=rows.get("mask"),
                weights=rows.get("weights"),
                axis_name=axis_name,
                groups=None if case.groups == 1 else case.groups,
                activation=ACTIVATIONS[case.activation].function,
                residual=rows.get("residual"),
            )

        y, stats = MODES[case.mode].execute(instance, params, rows)
        return y, jax.tree.map(lambda v: v[0], stats)

    return program


def law_running(case: Case, data: Data) -> Iterator[Compared]:
    """Compares y and running statistics of three batches of jbn.batch_norm with the oracle."""
    update = UPDATES[case.rule]
    dtype = tolerance.accumulator(case.dtype)
    eps = tolerance.eps(dtype)
    new = jbn.init_stats(case.sizes, dtype)
    batches, two, size = [], [], 0.0
    for k in range(3):
        data = fuzz_cases.make(case._replace(seed=case.seed + k))
        x, w = data.rows["x"], data.w
        params = jbn.Params(data.scale, data.bias), jax.tree.map(lambda v: v.astype(dtype), new)
        y, new = run(case, _running_program(case.program), params, data.rows)
        y_two, mean, var = _by_two_passes(case, data)
        t = truth(case, data)
        rows = (in_order(case, y), t.values["y"], y_two, t.sizes["y"])
        yield Compared("y", *(per_part(case, v)[t.sound] for v in rows), case.dtype, eps)
        if case.groups > 1:
            _, mean, var = _by_two_passes(case._replace(groups=1), data)
        batches.append(moments(case, x, w))
        two.append(batches[-1]._replace(mean=mean[0], var=var[0]))
        finite = np.where(True if w is None else w > 0, np.asarray(x, np.float64), 0.0)
        size = np.maximum(size, np.abs(finite).max(case.reduced))
    true, base = (oracle.running(b, **update[1]) for b in (batches, two))
    # Between one value and two the unbiased variance is a matter of convention.
    counts = np.array([np.broadcast_to(m.count, case.sizes) for m in batches])
    keep = ((counts == 0) | (counts > 1.5)).all(0)
    keep &= np.array([_sound(case._replace(epsilon=1.0), m.var) for m in batches]).all(0)
    for name in ("mean", "var", "count"):
        ours, right, twice = (np.asarray(getattr(s, name))[keep] for s in (new, true, base))
        spread = size[keep] if name == "mean" else np.abs(right)
        yield Compared(f"stats.{name}", ours, right, twice, spread, str(np.dtype(dtype)), eps)


def _by_two_passes(case: Case, data: Data) -> tuple[np.ndarray, ...]:
    """Returns (y, mean, var) of two passes in the accumulator's dtype, groups consecutive."""
    sort = functools.partial(in_order, case)
    args = sort(data.rows["x"]), data.scale, data.bias, sort(data.rows.get("residual"))
    zeros = np.zeros((case.groups, *case.sizes), tolerance.accumulator(case.dtype))
    program = _two_passes_program(case.program._replace(law="normalize"))
    return to_numpy(program(args, sort(data.w), (data.rows["dy"], zeros, zeros))[1])


def _cuts(case: Case) -> dict[str, list[tuple[int, int]]]:
    """Returns where the parts of a batch begin and end that the library merges or pools."""
    n = case.shape[case.reduced[0]]
    half = n // 2 or 1
    thirds = [(k * n // 3, (k + 1) * n // 3) for k in range(3)]
    return {"moments": [(0, n)], "merge": [(0, 1), (1, half), (half, n)], "pool": thirds}


def _part(case: Case, rows: dict, start: int, stop: int) -> dict:
    at = case.reduced[0]
    where = (slice(None),) * at + (slice(start, stop),)
    return {k: v[where] if v.shape[at] == case.shape[at] else v for k, v in rows.items()}


@functools.lru_cache(COMPILED)
def _pool_program(case: Case):
    def full(m):  # one count for each feature, so that moments can be stacked
        return m._replace(count=m.count + jnp.zeros_like(m.var))

    @jax.jit
    def program(rows):
        found = {}
        for function, cuts in _cuts(case).items():
            parts = [_part(case, rows, *cut) for cut in cuts]
            parts = [full(jbn.moments(part.pop("x"), axis=case.axis, **part)) for part in parts]
            if function == "pool":
                found[function] = jbn.pool(jax.tree.map(lambda *v: jnp.stack(v), *parts))
            else:
                found[function] = functools.reduce(jbn.merge, parts)
        return found

    return program


def law_pool(case: Case, data: Data) -> Iterator[Compared]:
    """Compares jbn.moments of the whole batch, and merged and pooled ones, with the oracle."""
    x, w = data.rows["x"], np.ones(case.shape) if data.w is None else data.w
    m = moments(case, x, w)
    rows = {k: v for k, v in data.rows.items() if k in ("x", "mask", "weights")}
    found = to_numpy(_pool_program(case.program)(rows))
    dtype = tolerance.accumulator(case.dtype)
    _, mean, var = _by_two_passes(case, data)
    finite = np.where(w > 0, np.asarray(x, np.float64), 0.0)
    size = {"mean": np.abs(finite).max(case.reduced), "var": m.var}
    sound = _sound(case._replace(epsilon=1.0), m.var).reshape(-1)
    eps = tolerance.eps(dtype)
    for function, cuts in _cuts(case).items():
        result = jax.tree.map(lambda v: np.broadcast_to(v, case.sizes), found[function])
        yield _counts(f"{function}.count", result.count, m.count, case)
        parts = [_part(case, {"x": x, "w": w}, *cut) for cut in cuts]
        between = _of_rounded_means(case, parts, m) * eps
        for name, base in (("mean", mean[0]), ("var", m.var + np.abs(var[0] - m.var) + between)):
            values = (getattr(result, name), getattr(m, name), base, size[name])
            values = (flat(v)[sound] for v in values)
            yield Compared(f"{function}.{name}", *values, str(np.dtype(dtype)), eps)


def _of_rounded_means(case: Case, parts, whole: oracle.Moments) -> np.ndarray:
    """Returns the error of the variance, in units of eps, from the rounded means of parts.

    The sum of n_i / n (mean_i - mean)^2 changes by the error of mean_i times twice the difference.
    """
    total = np.zeros(case.sizes)
    for part in parts:
        m = moments(case, part["x"], part["w"])
        share = m.count / np.where(whole.count > 0, whole.count, 1.0)
        total += share * np.abs(m.mean - whole.mean) * np.abs(m.mean)
    return total


LAWS = {
    "normalize": law_normalize,
    "derivatives": law_derivatives,
    "inference": law_inference,
    "running": law_running,
    "pool": law_pool,
}
PROGRAMS = (  # the programs that they make are cached
    _normalize_program,
    _two_passes_program,
    _derivatives_program,
    _textbook_program,
    _inference_program,
    _running_program,
    _pool_program,
)


# --- The tester --------------------------------------------------------------------------------


def check(case: Case) -> list[Failure]:
    """Returns all failures of one case."""
    try:
        # The references' squares may overflow or underflow; `_sound` leaves such results out.
        with types(case), np.errstate(all="ignore"), warnings.catch_warnings():
            warnings.simplefilter("error")
            results = list(LAWS[case.law](case, fuzz_cases.make(case)))
        wrong = [(c.name, judge(c)) for c in results if len(c.truth)]
    except Exception as error:
        message = traceback.format_exc(limit=-3)
        return [Failure(case, f"raises {type(error).__name__}", message)]
    return [Failure(case, name, message) for name, message in wrong if message]


def shrink(case: Case, kind: str) -> Case:
    """Finds a simpler case that fails in the same way, by setting fields to their defaults."""
    for name, default in Case._field_defaults.items():
        if name in ("law", "order", "seed") or getattr(case, name) == default:
            continue
        simpler = case._replace(**{name: default})
        if name == "shape":
            simpler = simpler._replace(axis=(-1,))
        with contextlib.suppress(Exception):
            if any(f.kind == kind for f in check(simpler)):
                case = simpler
    return case


def fuzz(seed: int, cases: float, seconds: float) -> list[Failure]:
    """Draws and checks cases until there were `cases` of them, or `seconds` have passed."""
    rng = np.random.default_rng(seed)
    began, done, failures = time.monotonic(), 0, []
    while done < cases and time.monotonic() - began < seconds:
        for case in fuzz_cases.draw(rng, REPEATS):
            if done >= cases or time.monotonic() - began >= seconds:
                break
            found = check(case)
            for failure in found:
                report(failure)
            failures += found
            done += 1
        if done // REPEATS % 10 == 0:
            # Old compiled programs are not used again, and fill the memory.
            jax.clear_caches()
            print(f"{done} cases in {time.monotonic() - began:.0f} s", flush=True)
    print(f"{done} cases in {time.monotonic() - began:.0f} s, {len(failures)} failures")
    return failures


def report(failure: Failure) -> None:
    """Prints what failed and how to see it again."""
    print(f"FAILED {failure.case.law} {failure.kind}: {failure.message}")
    print(f"    python -m tests.fuzz --run '{failure.case}'", flush=True)


def summary(failures: list[Failure]) -> None:
    """Prints how many failures there were of each kind, with one example."""
    kinds = collections.defaultdict(list)
    for failure in failures:
        kinds[failure.case.law, failure.kind].append(failure)
    for (law, kind), found in sorted(kinds.items(), key=lambda item: -len(item[1])):
        print(f"{len(found):5} {law} {kind}: e.g. --run '{found[0].case}'")


def main(arguments: list[str]) -> int:
    """Returns the exit status, which is 1 if a case failed."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=float("inf"))
    parser.add_argument("--cases", type=float, default=float("inf"))
    parser.add_argument("--seed", type=int, help="by default one from the clock")
    parser.add_argument("--run", metavar="CASE", help="the line of one case")
    parser.add_argument("--shrink", action="store_true", help="look for a simpler case")
    args = parser.parse_args(arguments)
    if args.run is not None:
        failures = check(fuzz_cases.parse(args.run))
        if args.shrink and failures:
            failures = check(shrink(*failures[0][:2]))
        for failure in failures:
            report(failure)
        print(f"{len(failures)} failures")
        return int(bool(failures))
    if args.minutes == args.cases == float("inf"):
        args.minutes = 3
    seed = time.time_ns() // 10**6 % 2**31 if args.seed is None else args.seed
    print(f"jax {jax.__version__}, seed {seed}", flush=True)
    failures = fuzz(seed, args.cases, 60 * args.minutes)
    summary(failures)
    return int(bool(failures))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
