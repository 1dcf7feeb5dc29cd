"""The table of inputs; each test runs over the rows that its law concerns."""

import zlib
from typing import NamedTuple

import numpy as np

from tests import oracle, tolerance


class Case(NamedTuple):
    """Shape, axis, dtype, offset, spread, mask and weights of one input."""

    shape: tuple[int, ...]
    axis: int | tuple[int, ...] = -1
    dtype: str = "float32"
    offset: float = 0.0
    std: float = 1.0
    mask: str = "none"  # examples | positions | features | channel (one has no position at all)
    weights: str = "none"  # examples | features (about a fifth of them zero)
    values: str = "normal"  # integer | symmetric | constant | one_hot | relu: some equal the mean

    def __str__(self):
        """Returns the id of the test."""
        axis = "_".join(map(str, np.atleast_1d(self.axis)))
        parts = ["x".join(map(str, self.shape)), f"axis{axis}", self.dtype]
        if self.offset or self.std != 1.0:
            parts.append(f"{self.offset:g}±{self.std:g}")
        parts += [f"mask-{self.mask}"] * (self.mask != "none")
        parts += [f"weights-{self.weights}"] * (self.weights != "none")
        parts += [self.values] * (self.values != "normal")
        return "-".join(parts)

    @property
    def ratio(self):
        """|mean| / std, on which the tolerance depends."""
        return abs(self.offset) / self.std

    @property
    def kwargs(self):
        """The keyword arguments that the oracle and the library share."""
        return {"axis": self.axis}


class Data(NamedTuple):
    """The NumPy arrays of a case: x and dy in its dtype, mask in bool, others in float32 or 64."""

    x: np.ndarray
    scale: np.ndarray
    bias: np.ndarray
    mask: np.ndarray | None
    weights: np.ndarray | None
    dy: np.ndarray
    dmean: np.ndarray
    dvar: np.ndarray

    @property
    def support(self):
        """Mask and weights as keyword arguments."""
        return {"mask": self.mask, "weights": self.weights}

    @property
    def valid(self):
        """The positions that take part, as bool in the shape of x."""
        return oracle.position_weights(self.x, self.mask, self.weights) > 0


AXES = (
    Case((64, 5)),
    Case((5, 64), axis=0),
    Case((4, 6, 16), axis=1),
    Case((4, 6, 16), axis=-2),
    Case((3, 5, 6, 4), axis=-1),
    Case((3, 4, 5, 6), axis=1),
    Case((2, 3, 4, 3, 2), axis=-4),
    Case((3, 4, 5, 6), axis=(1, 3)),
    Case((3, 4, 5, 6), axis=(-1, 1)),
    Case((7, 2, 3), axis=(-2, -1)),
    Case((2, 3, 7), axis=(0, 1)),
    Case((2, 4)),
)

OFFSETS = (
    Case((64, 5), offset=1e3),
    Case((64, 5), offset=1e4),
    Case((64, 5), offset=-1e4),
    Case((4096, 3), offset=1e3),
    Case((8, 24, 24, 3), offset=1e4),
    Case((8, 3, 24, 24), axis=1, offset=1e4),
    Case((65536, 2), offset=1e4),
    Case((512, 3), offset=1e1, std=1e-2),
    Case((512, 3), std=1e-3),  # the variance is a tenth of epsilon
    Case((512, 3), offset=1e8, std=1e5),
)

DTYPES = (
    Case((64, 5), dtype="bfloat16"),
    Case((64, 5), dtype="float16"),
    Case((4, 6, 16), axis=1, dtype="bfloat16"),
    Case((4096, 3), dtype="bfloat16", offset=8.0),
    Case((4096, 3), dtype="float16", offset=100.0),
    Case((512, 3), dtype="float16", offset=3e4, std=4e3),  # the sum of three overflows float16
)

MASKS = (
    Case((32, 5), mask="examples"),
    Case((4, 6, 16), axis=1, mask="examples"),
    Case((4, 6, 16), axis=1, mask="positions"),
    Case((3, 5, 6, 4), mask="positions"),
    Case((32, 5), mask="features"),
    Case((3, 4, 5, 6), axis=(1, 3), mask="features"),
    Case((32, 5), mask="channel"),
    Case((4, 5, 16), axis=1, mask="channel"),
    Case((32, 5), mask="positions", offset=1e4),
    Case((64, 5), mask="examples", dtype="bfloat16"),
    Case((64, 5), mask="features", dtype="float16"),
    Case((32, 5), weights="examples"),
    Case((4, 6, 16), axis=1, weights="features"),
    Case((32, 5), weights="examples", offset=1e4),
    Case((32, 5), mask="examples", weights="features"),
    Case((64, 5), weights="examples", dtype="bfloat16"),
)

# Real data have values that equal the mean and each other; normal random numbers never do.
VALUES = (
    Case((5, 3), values="symmetric"),
    Case((8, 4), values="integer"),
    Case((4, 6, 16), axis=1, values="relu"),
    Case((6, 8), values="one_hot"),
    Case((8, 3), values="constant", offset=-3.0),
    Case((8, 4), values="integer", mask="examples"),
    Case((8, 4), values="integer", weights="features"),
)

ALL = AXES + OFFSETS + DTYPES + MASKS + VALUES


def make(case: Case, masked: float = 7.0) -> Data:
    """Makes the data of a case, the same on every call.

    Masked positions hold offset + `masked` * std. 7 is so far from all other values that it shows
    if it enters the statistics; NaN and inf are for the tests about them.
    """
    rng = np.random.default_rng(zlib.crc32(str(case).encode()))
    shape, wide = case.shape, tolerance.accumulator(case.dtype)
    features, reduced = oracle.axes(len(shape), case.axis)
    sizes = tuple(shape[a] for a in features)
    spread = case.std * np.expand_dims(rng.uniform(0.5, 2.0, sizes), reduced)
    x = case.offset + (
        spread * rng.normal(size=shape)
        if case.values == "normal"
        else _whole_numbers(rng, case, reduced)
    )
    mask, weights = _mask(rng, case, features, reduced), _weights(rng, case, reduced)
    valid = oracle.position_weights(x, mask, weights) > 0
    return Data(
        np.where(valid, x, case.offset + case.std * masked).astype(case.dtype),
        rng.uniform(0.5, 2.0, sizes).astype(wide),
        rng.normal(size=sizes).astype(wide),
        mask,
        None if weights is None else weights.astype(wide),
        rng.normal(size=shape).astype(case.dtype),
        rng.normal(size=sizes).astype(wide),
        rng.normal(size=sizes).astype(wide),
    )


def _whole_numbers(rng, case, reduced):
    x = rng.integers(-2, 3, size=case.shape).astype(np.float64)
    if case.values == "symmetric":
        (axis,) = reduced
        return np.broadcast_to(
            np.expand_dims(np.arange(case.shape[axis]) - (case.shape[axis] - 1) / 2, 1 - axis),
            case.shape,
        )
    if case.values == "constant":
        return np.zeros(case.shape)
    if case.values == "one_hot":  # the last feature is never hot
        return np.eye(case.shape[-1])[rng.integers(case.shape[-1] - 1, size=case.shape[:-1])]
    return np.maximum(x, 0) if case.values == "relu" else x


def _mask(rng, case, features, reduced):
    if case.mask == "none":
        return None
    shape = tuple(
        size
        if case.mask in ("features", "channel")
        or (case.mask == "positions" and a in reduced)
        or (case.mask == "examples" and a == reduced[0])
        else 1
        for a, size in enumerate(case.shape)
    )
    mask = rng.uniform(size=shape) < 0.7
    # The first row is masked, so that code that takes the shift from it has to check the mask.
    mask[(0,) * len(shape)] = False
    if case.mask == "channel":
        mask[tuple(1 if a in features else slice(None) for a in range(len(shape)))] = False
    return mask


def _weights(rng, case, reduced):
    if case.weights == "none":
        return None
    shape = tuple(
        size if case.weights == "features" or a == reduced[0] else 1
        for a, size in enumerate(case.shape)
    )
    weights = rng.uniform(0.1, 3.0, size=shape) * (rng.uniform(size=shape) < 0.8)
    weights[(0,) * len(shape)] = 0.0
    return weights
