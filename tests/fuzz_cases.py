"""Draws the random cases of `tests.fuzz`, reads and writes their lines, and makes their data.

The fields of a case before `data` decide which programs are compiled; `data` and the fields after
it decide only what arrays hold. Cases are drawn in runs that share the fields before `data`,
because compiling takes a second and running a millisecond.
"""

import math
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from tests import executions, oracle, tolerance

SHAPES = (
    *((64, 2), (8, 3), (2, 4), (16, 1), (32, 1, 3), (4, 6, 5), (8, 3, 3, 2), (4, 4, 5, 2, 2)),
    *((12, 1), (1, 9, 3), (256, 3), (16, 5, 4), (4, 5, 5, 4), (8, 2, 3, 1, 3), (4, 2), (40, 7)),
)
LARGE = (
    *((65536, 2), (4096, 3), (1048576, 1), (64, 50, 8)),
    *((16, 56, 56, 4), (16, 112, 112, 4), (8, 24, 24, 3)),
)
DTYPES = ("float32",) * 5 + ("bfloat16", "float16", "float64")
HERE = ("eager", "one_device", "jit")  # for any layout: no axis must hold the examples
SPLIT = (*(mode.name for mode in executions.ALL if mode.name != "jit"), "jit_sharded", "examples")
KINDS = (
    *("normal", "integers", "sparse", "onehot", "constant", "symmetric", "two_values", "ramp"),
    *("lognormal", "cauchy", "odd_example", "border", "outlier", "odd_place", "odd_rows"),
)
# Large arrays have these kinds: a few values are far from the mean, and one may be the shift.
ADVERSE = ("odd_place", "odd_rows", "odd_example", "border", "outlier", "sparse", "lognormal")
OFFSETS = (0.0,) * 4 + (1.0, -3.0, 100.0, 1e3, -1e4, 1e5, 1e6)
STDS = (1.0,) * 5 + (1e-2, 1e2, 1e-6, 1e6, 1e-13, 1e13)
RULES = ("ema", "debias", "unbiased", "cumulative", "cumulative_unbiased", "last")
ORDERS = {1: ("f", "r"), 2: ("fr", "rf", "rr", "ff"), 3: ("ffr", "rrr", "frr", "rfr", "rff", "fff")}


class Case(NamedTuple):
    """One comparison. `str` writes the fields that are not the default, and `parse` reads them."""

    law: str = "normalize"  # normalize | derivatives | inference | running | pool
    shape: tuple[int, ...] = (64, 2)
    axis: tuple[int, ...] = (-1,)
    dtype: str = "float32"
    mode: str = "jit"  # HERE or SPLIT
    mask: str = "none"  # examples | positions | features | feature (one of them has no data)
    weights: str = "none"  # examples | positions | features
    groups: int = 1
    activation: str = "none"  # relu | tanh | silu
    residual: bool = False
    epsilon: float = 1e-5
    affine: str = "both"  # scale | bias | none
    order: str = "r"  # of derivatives: f is jvp and r is grad; the letter on the right comes first
    rule: str = "ema"
    data: str = "normal"
    offset: float = 0.0
    std: float = 1.0
    junk: str = "data"  # what masked positions hold: data | far | nan | inf | huge
    weighting: str = "ordinary"  # zeros | tiny | unit
    factor: float = 1.0  # of all weights
    seed: int = 0

    def __str__(self):
        return ",".join(
            f"{name}={'x'.join(map(str, value)) if isinstance(value, tuple) else value}"
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
        )

    @property
    def program(self) -> "Case":
        """The case with the default data, which is equal for cases that run the same programs."""
        return Case(*self[: self._fields.index("data")])

    @property
    def features(self) -> tuple[int, ...]:
        return oracle.axes(len(self.shape), self.axis)[0]

    @property
    def reduced(self) -> tuple[int, ...]:
        return oracle.axes(len(self.shape), self.axis)[1]

    @property
    def sizes(self) -> tuple[int, ...]:
        """The shape of scale and bias."""
        return tuple(self.shape[a] for a in self.features)


def parse(text: str) -> Case:
    """Reads the case from a line that `str(case)` has written."""
    case = Case()
    for item in filter(None, text.split(",")):
        name, value = item.split("=")
        default = Case._field_defaults[name]
        if isinstance(default, tuple):
            value = tuple(map(int, value.split("x")))
        else:
            value = value == "True" if isinstance(default, bool) else type(default)(value)
        case = case._replace(**{name: value})
    return case


def draw(rng: np.random.Generator, repeats: int) -> list[Case]:
    """Draws `repeats` cases of one program."""
    program = _program(rng)
    return [_with_data(rng, program) for _ in range(repeats)]


def _one_of(rng, choices):
    return choices[rng.integers(len(choices))]


def _program(rng) -> Case:
    law = _one_of(rng, ("normalize",) * 5 + ("derivatives",) * 3 + ("running", "pool", "inference"))
    shape = _one_of(rng, LARGE if law != "derivatives" and rng.uniform() < 0.3 else SHAPES)
    shape = tuple(map(int, shape))
    mode = _one_of(rng, HERE if rng.uniform() < 0.5 else SPLIT)
    if law in ("pool", "inference") or (law == "derivatives" and mode == "eager"):
        mode = "one_device"
    axis = (len(shape) - 1,)
    if rng.uniform() < 0.3 and math.prod(shape) < 1e4:
        k = rng.integers(1, len(shape))
        axis = tuple(map(int, rng.permutation(len(shape))[:k]))
    if mode in SPLIT and (0 in axis or shape[0] % executions.INSTANCES):
        mode = _one_of(rng, HERE[1:])
    case = Case(law, shape, tuple(a - len(shape) for a in axis), mode=mode)
    if law == "running" and math.prod(shape[a] for a in case.reduced) == 1:
        case = case._replace(axis=(-1,))  # batch_norm refuses one value per feature
    case = case._replace(
        dtype=_one_of(rng, DTYPES if law != "derivatives" else ("float32", "float64")),
        epsilon=_one_of(rng, (1e-5, 1e-5, 1e-3, 0.0)) if law != "pool" else 1e-5,
        affine=_one_of(rng, ("both", "both", "both", "scale", "bias", "none")),
    )
    if law in ("derivatives", "inference"):
        case = case._replace(order=_one_of(rng, ORDERS[_one_of(rng, (1, 2, 2, 3))]))
    if law == "running":
        case = case._replace(rule=_one_of(rng, RULES))
    if rng.uniform() < 0.4 and law != "pool":
        case = case._replace(
            activation=_one_of(rng, ("none", "relu", "relu", "tanh", "silu")),
            residual=bool(rng.uniform() < 0.5),
        )
    if law != "inference":
        if rng.uniform() < 0.35:
            case = case._replace(mask=_one_of(rng, ("examples", "positions", "features")))
            if rng.uniform() < 0.2 and math.prod(case.sizes) > 1:
                case = case._replace(mask="feature")
        if rng.uniform() < 0.3:
            case = case._replace(weights=_one_of(rng, ("examples", "positions", "features")))
        rows = shape[case.reduced[0]]
        share = executions.INSTANCES if mode in SPLIT and named(mode) else 1
        divisors = [g for g in (2, 4) if rows % (g * share) == 0 and rows // (g * share) > 1]
        if divisors and rng.uniform() < 0.2 and mode != "examples" and law != "pool":
            case = case._replace(groups=_one_of(rng, divisors))
    if mode == "examples" and shape[case.reduced[0]] > 4096:
        case = case._replace(mode="jit")  # over a million instances XLA sums in another order
    return case


def named(mode: str) -> bool:
    """Tells whether the batch is split over a named axis in this mode."""
    return mode == "examples" or mode in {m.name for m in executions.NAMED}


def _with_data(rng, program: Case) -> Case:
    case = program._replace(
        data=_one_of(rng, ADVERSE if math.prod(program.shape) > 1e4 else KINDS),
        offset=_one_of(rng, OFFSETS),
        std=_one_of(rng, STDS),
        junk=_one_of(rng, ("data", "data", "far", "nan", "inf", "huge")),
        weighting=_one_of(rng, ("ordinary", "ordinary", "zeros", "tiny", "unit")),
        factor=_one_of(rng, (1.0, 1.0, 1.0, 1e-30, 1e-10, 1e10, 1e30)),
        seed=int(rng.integers(2**31)),
    )
    if case.law in ("derivatives", "inference"):  # their terms have 1/std up to the seventh power
        least = 1e-3 if case.epsilon == 0 else 1e-6
        case = case._replace(std=float(np.clip(case.std, least, 1e6)))
    if case.dtype == "float16":  # whose range is 6e-8 to 65504
        case = case._replace(
            offset=float(np.clip(case.offset, -1e3, 1e3)), std=float(np.clip(case.std, 0.01, 100))
        )
    if case.mask == "none":
        case = case._replace(junk="data")
    if case.weights == "none":
        case = case._replace(weighting="ordinary", factor=1.0)
    return case


class Data(NamedTuple):
    """The arrays of a case, in NumPy."""

    rows: dict[str, np.ndarray]  # x, dy, and mask, weights, residual where there are any
    scale: np.ndarray | None
    bias: np.ndarray | None
    dmean: np.ndarray  # [groups, *C]
    dvar: np.ndarray
    w: np.ndarray | None  # [x.shape] float64: the weights as the library counts them


def make(case: Case) -> Data:
    """Makes the arrays of a case, the same on every call."""
    rng = np.random.default_rng(case.seed)
    wide = np.dtype(tolerance.accumulator(case.dtype))
    mask, weights = _mask(rng, case), _weights(rng, case)
    x, w = _values(rng, case), None
    if weights is not None and case.weighting == "tiny":
        x = np.where(weights < 1e-3 * case.factor, x + 1e3 * case.std, x)
    dy = rng.normal(size=case.shape)
    limit = min(float(jnp.finfo(case.dtype).max), 1e200)  # which the float64 oracle can divide
    if mask is not None:
        held = {"data": x, "far": x + 1e3 * case.std, "nan": np.nan, "inf": np.inf, "huge": limit}
        x = np.where(mask, x, held[case.junk])
        if case.junk == "huge":  # whose xhat is beyond float32, or nearly
            dy = np.where(mask, dy, 0.0)
    if mask is not None or weights is not None:
        w = np.ones(case.shape) if mask is None else np.broadcast_to(mask, case.shape) * 1.0
    rows = {"x": np.clip(x, -limit, limit) if case.junk != "inf" else x, "dy": dy}
    rows = {name: values.astype(case.dtype) for name, values in rows.items()}
    if mask is not None:
        rows["mask"] = mask
    if weights is not None:
        rows["weights"] = weights.astype(wide)
        w = w * _counted(rows["weights"])
    if case.residual:
        rows["residual"] = rng.normal(size=case.shape).astype(case.dtype)
    stats = (case.groups, *case.sizes)
    scale, bias, dmean, dvar = (
        rng.normal(size=size).astype(wide) for size in (case.sizes, case.sizes, stats, stats)
    )
    return Data(
        rows,
        scale if case.affine in ("both", "scale") else None,
        bias if case.affine in ("both", "bias") else None,
        dmean,
        dvar,
        w,
    )


def _counted(weights: np.ndarray) -> np.ndarray:
    """Returns the weights as they count: 0 below the dtype's normal range, and at most a cap."""
    info = np.finfo(weights.dtype)
    weights = np.where(weights < info.tiny, 0, weights).astype(np.float64)
    return np.minimum(weights, float(info.max) / 2**24)


def _values(rng, case: Case) -> np.ndarray:
    """Makes x, of the case's shape."""
    rows = tuple(case.shape[a] for a in case.reduced)
    c = math.prod(case.sizes)
    z = _standard(rng, case.data, rows, c)
    exact = case.data in ("integers", "sparse", "onehot", "symmetric", "two_values")
    spread = np.ones(c) if exact else rng.uniform(0.5, 2.0, c)
    shift = np.ones(c) if exact else rng.uniform(0.5, 1.0, c)
    x = (case.offset * shift + case.std * spread * z).reshape(*rows, *case.sizes)
    return np.moveaxis(x, range(len(case.shape)), (*case.reduced, *case.features))


def _standard(rng, kind: str, rows: tuple[int, ...], c: int) -> np.ndarray:
    """Draws values [*rows, c] of the kind, without offset and of a magnitude of about 1."""
    n = math.prod(rows)
    z = rng.normal(size=(*rows, c))
    flat = z.reshape(n, c)  # a view
    odd = _one_of(rng, (-30.0, 30.0, 3e3, 1e4, 0.0))
    places = sorted({n // 4, n // 2, 3 * n // 4, *rng.choice([0, n - 1, rng.integers(n)], 1)})
    match kind:
        case "integers":
            flat[:] = rng.integers(-2, 3, size=(n, c))
        case "sparse":
            flat[:] = np.maximum(flat, 0) * (rng.uniform(size=(n, c)) < 0.1)
        case "onehot":
            flat[:] = rng.integers(c, size=(n, 1)) == np.arange(c)
        case "two_values":
            flat[:] = rng.uniform(size=(n, c)) < 0.1
        case "constant":
            flat[:, rng.uniform(size=c) < 0.7] = 0.0
        case "symmetric":
            half = np.round(4 * flat[: n // 2]) / 4
            flat[:] = np.concatenate([half, -half, np.zeros((n % 2, c))])
        case "ramp":
            flat[:] = 0.01 * flat + np.linspace(-1, 1, n)[:, None]
        case "lognormal":
            flat[:] = np.exp(3 * flat)
        case "cauchy":
            flat[:] = rng.standard_cauchy((n, c))
        case "outlier":
            flat[rng.integers(n)] = odd
        case "odd_rows":
            flat[rng.permutation(places)[:2]] = odd
        case "odd_example":
            z[_one_of(rng, (0, rows[0] // 4, rows[0] // 2, 3 * rows[0] // 4, rows[0] - 1))] = odd
        case "odd_place":  # the same one in every example
            at = [_one_of(rng, (0, m // 2, m // 2, m - 1)) for m in rows[1:] or rows]
            z[(slice(None), *at) if rows[1:] else tuple(at)] = odd
        case "border":
            z[..., 0, :] = z[..., -1, :] = odd
    return z


def _mask(rng, case: Case) -> np.ndarray | None:
    if case.mask == "none":
        return None
    mask = rng.uniform(size=_support(case, case.mask)) < _one_of(rng, (0.3, 0.7, 0.95))
    if case.mask == "feature":
        mask[tuple(0 if a in case.features else slice(None) for a in range(mask.ndim))] = False
    return mask


def _weights(rng, case: Case) -> np.ndarray | None:
    if case.weights == "none":
        return None
    shape = _support(case, case.weights)
    weights = rng.uniform(0.1, 3.0, size=shape)
    drawn = rng.uniform(size=shape) < 0.3
    match case.weighting:
        case "zeros":
            weights = np.where(drawn, 0.0, weights)
        case "tiny":
            weights = np.where(drawn, 1e-20, weights)
        case "unit":
            repeats = math.prod(case.shape[a] for a in case.reduced if shape[a] == 1)
            weights = weights / weights.sum(case.reduced, keepdims=True) / repeats
    return weights * case.factor


def _support(case: Case, kind: str) -> tuple[int, ...]:
    return tuple(
        size
        if kind in ("features", "feature")
        or (kind == "positions" and a in case.reduced)
        or (kind == "examples" and a == case.reduced[0])
        else 1
        for a, size in enumerate(case.shape)
    )
