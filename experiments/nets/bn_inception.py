"""Inception with and without Batch Normalization, as the paper prints it, in Flax linen.

Its slots: ``norm`` makes a normalisation layer, ``conv`` a convolution.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax

import jbn.linen
from experiments.nets.slots import ModuleMaker, norm_activation


class ConvUnit(nn.Module):
    """``activation(BN(conv(x)))``, the layer that an Inception network is made of.

    Without a norm the convolution has a bias; with one, the norm's replaces it (section 3.2).

    Attributes:
      features: channels of the output.
      size: height and width of the kernel.
      stride: of the convolution.
      norm: makes a normalisation layer; None: there is none.
      conv: makes a convolution; takes what ``flax.linen.Conv`` takes.
      activation: an elementwise function.
      fused: the norm takes ``activation``, too, as jbn's do.
      depth_multiplier: if given, the convolution is separable: it filters every input channel on
        its own into so many channels, which a 1x1 convolution mixes into the features.
    """

    features: int
    size: int
    stride: int = 1
    norm: ModuleMaker | None = None
    conv: ModuleMaker = nn.Conv
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    fused: bool = False
    depth_multiplier: int | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x: [N, H, W, C]`` to ``[N, H / stride, W / stride, features]``."""
        kernel, stride = (self.size, self.size), self.stride
        if self.depth_multiplier is not None:
            depth, groups = self.depth_multiplier * x.shape[-1], x.shape[-1]
            spread: Any = nn.Conv(
                depth, kernel, stride, feature_group_count=groups, use_bias=False, dtype=x.dtype
            )
            x, kernel, stride = spread(x), (1, 1), 1
        conv: Any = self.conv(self.features, kernel, strides=stride, use_bias=self.norm is None)
        x = conv(x)
        if self.norm is None:
            return self.activation(x)
        return norm_activation(self.norm, self.fused, self.activation)(x)


class Row(NamedTuple):
    """One Inception module, a row of the paper's table: the channels of its branches.

    ``reduce_3x3`` and ``reduce_double`` belong to the 1x1 convolutions before the 3x3 ones. The
    pool branch ends with a 1x1 convolution of ``proj`` channels; with 0 it returns what it pooled.
    A module without a 1x1 branch and with stride 2 halves the resolution, between two stages.
    """

    name: str
    conv_1x1: int
    reduce_3x3: int
    conv_3x3: int
    reduce_double: int
    double_3x3: int
    pool: str  # "avg" or "max", 3x3
    proj: int
    stride: int = 1

    def width(self, channels: int) -> int:
        """Returns the channels of the output, for so many channels of the input."""
        return self.conv_1x1 + self.conv_3x3 + self.double_3x3 + (self.proj or channels)

    def scaled(self, width: float) -> Row:
        """Returns the module with a share of the channels, at least 1 in each of its branches."""
        channels = {k: v for k, v in self._asdict().items() if k in (*Row._fields[1:6], "proj")}
        return self._replace(**{k: max(1, round(width * v)) for k, v in channels.items() if v})


# The branches in the table of the paper's appendix, as printed. Those of 4c and 4d sum to 608
# channels, and so those of 4e to 1056, where the paper prints 576, 576 and 1024. For 3c and 4e it
# prints the resolution of their input.
BN_INCEPTION = (
    Row("3a", 64, 64, 64, 64, 96, "avg", 32),
    Row("3b", 64, 64, 96, 64, 96, "avg", 64),
    Row("3c", 0, 128, 160, 64, 96, "max", 0, stride=2),
    Row("4a", 224, 64, 96, 96, 128, "avg", 128),
    Row("4b", 192, 96, 128, 96, 128, "avg", 128),
    Row("4c", 160, 128, 160, 128, 160, "avg", 128),
    Row("4d", 96, 128, 192, 160, 192, "avg", 128),
    Row("4e", 0, 128, 192, 192, 256, "max", 0, stride=2),
    Row("5a", 352, 192, 320, 160, 224, "avg", 128),
    Row("5b", 352, 192, 320, 192, 224, "max", 128),
)


def rows(*names: str, width: float = 1.0, repeat: int = 1) -> tuple[Row, ...]:
    """Returns rows of the paper's table by name, or all of them; with a share of the channels.

    With `repeat` every module that keeps the resolution comes so many times, for a deeper network:
    "3a", "3a_2", and so on.

    Raises:
      ValueError: the table has no row of that name.
    """
    known = [row.name for row in BN_INCEPTION]
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"the table has no row {unknown[0]!r}. Expected {', '.join(known)}.")
    return tuple(
        row.scaled(width)._replace(name=row.name + (f"_{i}" if i > 1 else ""))
        for row in BN_INCEPTION
        for i in range(1, 1 + (repeat if row.stride == 1 else 1))
        if not names or row.name in names
    )


class InceptionModule(nn.Module):
    """Four branches side by side: 1x1; 1x1, 3x3; 1x1, 3x3, 3x3; pool, 1x1.

    Attributes:
      row: the channels of the branches.
      unit: makes a `ConvUnit`; takes features, size, stride.
    """

    row: Row
    unit: ModuleMaker = ConvUnit

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps ``x: [N, H, W, C]`` to ``[N, H / stride, W / stride, row.width(C)]``."""
        row, stride = self.row, self.row.stride
        branches = []
        if row.conv_1x1:
            branches.append(self._unit(row.conv_1x1, 1)(x))
        y = self._unit(row.reduce_3x3, 1)(x)
        branches.append(self._unit(row.conv_3x3, 3, stride)(y))
        y = self._unit(row.double_3x3, 3)(self._unit(row.reduce_double, 1)(x))
        branches.append(self._unit(row.double_3x3, 3, stride)(y))
        if row.pool == "max":
            y = nn.max_pool(x, (3, 3), (stride, stride), "SAME")
        else:
            y = mean_pool(x, (3, 3), (stride, stride), "SAME")
        branches.append(self._unit(row.proj, 1)(y) if row.proj else y)
        return jnp.concatenate(branches, axis=-1)

    def _unit(self, features: int, size: int, stride: int = 1) -> Any:
        return self.unit(features, size, stride)


class AuxiliaryHead(nn.Module):
    """Logits from the middle of the network, as in GoogLeNet (arXiv 1409.4842, section 5).

    It has a 5x5 mean pooling of stride 3, a 1x1 convolution, a hidden layer, Dropout of 70 %.

    Attributes:
      n_classes: logits a picture.
      unit: makes a `ConvUnit`; takes features and size.
      width: channels of the convolution; the hidden layer has eight times as many.
      activation: of the hidden layer.
    """

    n_classes: int
    unit: ModuleMaker = ConvUnit
    width: int = 128
    activation: Callable[[jax.Array], jax.Array] = nn.relu

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        """Maps ``x: [N, H, W, C]`` to ``[N, n_classes]``."""
        height, width = (min(5, n) for n in x.shape[1:3])
        x = mean_pool(x, (height, width), (3, 3), "VALID")
        unit: Any = self.unit(self.width, 1)
        x = unit(x).reshape(len(x), -1).astype(jnp.float32)
        x = self.activation(nn.Dense(8 * self.width)(x))
        x = nn.Dropout(0.7, deterministic=not train)(x)
        return nn.Dense(self.n_classes)(x)


class Inception(nn.Module):
    """A stem, Inception modules, the mean over all positions, Dropout, a linear readout.

    Attributes:
      rows: the modules.
      stem: channels, kernel size and stride of the convolutions before the modules; ``"pool"`` is a
        3x3 max pooling of stride 2, ``"lrn"`` a local response normalisation, if `lrn`.
      n_classes: logits a picture.
      norm: makes a normalisation layer; takes ``use_running_average``. None: there is none.
      conv: makes a convolution; takes what ``flax.linen.Conv`` takes.
      activation: the nonlinearity everywhere.
      fused: the norm takes ``activation``, too, as jbn's do.
      separable: the depth multiplier of the first convolution; None: it is an ordinary one.
      lrn: whether the responses of the stem are normalised locally, as in GoogLeNet.
      dropout: the share of the readout's inputs that are dropped in training.
      auxiliary: names of the rows after which an auxiliary head follows; others are ignored.
      kernel_init: initialiser of all convolutions, except the filters of the separable one, which
        no nonlinearity follows.
      dtype: dtype of all layers except the readouts; None: float32, as the parameters.
    """

    rows: Sequence[Row] = BN_INCEPTION
    stem: Sequence[tuple[int, int, int] | str] = (
        (64, 7, 2), "pool", "lrn", (64, 1, 1), (192, 3, 1), "lrn", "pool"
    )  # fmt: skip
    n_classes: int = 1000
    norm: ModuleMaker | None = jbn.linen.BatchNorm
    conv: ModuleMaker = nn.Conv
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    fused: bool = False
    separable: int | None = 8
    lrn: bool = False
    dropout: float = 0.0
    auxiliary: Sequence[str] = ()
    kernel_init: Callable[..., jax.Array] = nn.initializers.he_normal()
    dtype: Any = None

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> Any:
        """Maps ``x: [N, H, W, C]`` to logits ``[N, n_classes]``; ``train``: by batch moments.

        In training with `auxiliary` it returns the logits and a list of the auxiliary heads'
        logits. Dropout draws from the stream "dropout".
        """
        unit, x = self._unit_maker(train), x if self.dtype is None else x.astype(self.dtype)
        x = self._stem(unit, x)
        heads = []
        for row in self.rows:
            x = InceptionModule(row, unit, name=f"inception_{row.name}")(x)
            if row.name in self.auxiliary:
                head = AuxiliaryHead(self.n_classes, unit, activation=self.activation)
                heads.append(head(x, train))
        x = x.mean((1, 2)).astype(jnp.float32)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        logits = nn.Dense(self.n_classes, name="readout")(x)
        return (logits, heads) if heads and train else logits

    def _unit_maker(self, train: bool) -> ModuleMaker:
        norm, conv = self.norm, functools.partial(self.conv, kernel_init=self.kernel_init)
        if norm is not None:
            norm = functools.partial(norm, use_running_average=not train)
        if self.dtype is not None:
            conv = functools.partial(conv, dtype=self.dtype)
            norm = None if norm is None else functools.partial(norm, dtype=self.dtype)
        return functools.partial(
            ConvUnit, norm=norm, conv=conv, activation=self.activation, fused=self.fused
        )

    def _stem(self, unit: ModuleMaker, x: jax.Array) -> jax.Array:
        multiplier = self.separable
        for part in self.stem:
            if part == "pool":
                x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
            elif part == "lrn":
                x = local_response_norm(x) if self.lrn else x
            else:
                layer: Any = unit(*part, depth_multiplier=multiplier)
                x, multiplier = layer(x), None
        return x


def mean_pool(
    x: jax.Array, window: tuple[int, int], strides: tuple[int, int], padding: str
) -> jax.Array:
    """Computes ``flax.linen.avg_pool`` without promoting dtypes; the zeros of "SAME" count."""
    return nn.pool(x, 0.0, lax.add, window, strides, padding) / math.prod(window)


def local_response_norm(
    x: jax.Array, size: int = 5, alpha: float = 1e-4, beta: float = 0.75
) -> jax.Array:
    """Divides x by ``(1 + alpha * mean of x^2 over `size` neighbouring channels)^beta``.

    Channels are last. Networks had this before Batch Normalization; the constants are those of
    AlexNet and GoogLeNet.
    """
    window = (1,) * (x.ndim - 1) + (size,)
    wide = x.astype(jnp.float32)
    total = lax.reduce_window(wide**2, 0.0, lax.add, window, (1,) * x.ndim, "SAME")
    return (wide * (1 + alpha / size * total) ** -beta).astype(x.dtype)


# The paper's comparison, for 224 x 224 pixels: the same tower with and without normalisation.
BNInception = Inception
PlainInception = functools.partial(Inception, norm=None, lrn=True, dropout=0.4)


def wide_inception(width: float = 1.0, **slots: Any) -> Inception:
    """Makes the paper's tower with a share of the channels; `slots` as for `Inception`."""
    stem = tuple(
        part if isinstance(part, str) else (max(1, round(width * part[0])), *part[1:])
        for part in Inception.stem
    )
    return Inception(**({"rows": rows(width=width), "stem": stem} | slots))


def small_inception(width: float = 1 / 8, **slots: Any) -> Inception:
    """Makes the paper's network, narrow, for 32 x 32 pixels: all its depth, 1/1000 of its work.

    The stem reduces the resolution to 8 x 8, the modules to 2 x 2.

    Args:
      width: the share of the channels that every module has.
      **slots: as for `Inception`.
    """
    stem = ((max(1, round(width * 192)), 3, 2), "lrn", "pool")
    small = {"rows": rows(width=width), "stem": stem, "n_classes": 10, "separable": None}
    return Inception(**(small | slots))
