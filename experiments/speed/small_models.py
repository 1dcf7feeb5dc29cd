"""Small models that represent common networks, with Flax's normalisation or jbn's.

A program is a whole training step: loss, gradients, new statistics, SGD. For a single layer it is
forward and backward.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from flax import nnx

import jbn.linen
import jbn.nnx
from experiments.nets import resnet

FLAX, JBN = "flax", "jbn"
NORMS: dict[str, dict[str, Any]] = {
    "linen": {FLAX: nn.BatchNorm, JBN: jbn.linen.BatchNorm},
    "nnx": {FLAX: nnx.BatchNorm, JBN: jbn.nnx.BatchNorm},
}

# --- Models: attribute ``norm`` makes a normalisation layer ---------------------------------------


class CNN(nn.Module):
    """Two convolutions, each with a norm, ReLU and pooling, and two dense layers."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        for features in (32, 64):
            x = nn.Conv(features, (3, 3))(x)
            x = nn.relu(self.norm(use_running_average=not train)(x))
            x = nn.avg_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Dense(256)(x.reshape(len(x), -1)))
        return nn.Dense(10)(x)


class DenseNet(nn.Module):
    """A network whose layers see the concatenation of all before, and add `growth` channels."""

    norm: Any
    layers: int = 12
    growth: int = 12

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = nn.Conv(16, (3, 3), use_bias=False)(x)
        for _ in range(self.layers):
            y = nn.relu(self.norm(use_running_average=not train)(x))
            y = nn.Conv(self.growth, (3, 3), use_bias=False)(y)
            x = jnp.concatenate([x, y], -1)
        return nn.Dense(10)(x.mean((1, 2)))


class EfficientNet(nn.Module):
    """Inverted bottlenecks: 1x1 to four times the width, depthwise 3x3, 1x1 to the width."""

    norm: Any
    widths: Sequence[int] = (16, 16, 24, 24)

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(self.norm, use_running_average=not train)
        x = nn.Conv(self.widths[0], (3, 3), use_bias=False)(x)
        for width in self.widths:
            inner = 4 * width
            y = nn.swish(norm()(nn.Conv(inner, (1, 1), use_bias=False)(x)))
            depthwise = nn.Conv(inner, (3, 3), feature_group_count=inner, use_bias=False)
            y = nn.swish(norm()(depthwise(y)))
            y = norm()(nn.Conv(width, (1, 1), use_bias=False)(y))
            x = x + y if x.shape == y.shape else y
        return nn.Dense(10)(x.mean((1, 2)))


class RegNet(nn.Module):
    """Blocks of 1x1, grouped 3x3 and 1x1, beside a 1x1 that fits the input to their width."""

    norm: Any
    widths: Sequence[int] = (16, 32, 48)
    group: int = 8  # channels of a group

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def conv_norm(x: jax.Array, width: int, size: int, groups: int = 1, stride: int = 1) -> Any:
            conv = nn.Conv(width, (size, size), stride, feature_group_count=groups, use_bias=False)
            return self.norm(use_running_average=not train)(conv(x))

        for width in self.widths:
            y = nn.relu(conv_norm(x, width, 1))
            y = nn.relu(conv_norm(y, width, 3, width // self.group, 2))
            x = nn.relu(conv_norm(y, width, 1) + conv_norm(x, width, 1, stride=2))
        return nn.Dense(10)(x.mean((1, 2)))


class Scanned(nn.Module):
    """Residual blocks of one shape, whose parameters and statistics are stacked on a first axis."""

    norm: Any
    blocks: int = 8
    width: int = 16

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        norm = functools.partial(self.norm, use_running_average=not train)
        x = nn.Conv(self.width, (3, 3), use_bias=False)(x)
        scan = nn.scan(
            lambda block, x, _: (block(x), None),
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            length=self.blocks,
        )
        x, _ = scan(resnet.ResidualBlock(self.width, norm=norm), x, None)
        return nn.Dense(10)(x.mean((1, 2)))


class Critic(nn.Module):
    """A network with a norm on the input and after each hidden layer."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.norm(use_running_average=not train)(x)
        for features in (64, 64):
            x = self.norm(use_running_average=not train)(nn.relu(nn.Dense(features)(x)))
        return nn.Dense(1)(x)[..., 0]


class Critics(nn.Module):
    """Two critics of the same inputs, each with one number an example."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shared: Any = None  # the axis of x; Flax annotates the argument as a number
        several = nn.vmap(
            Critic,
            variable_axes={"params": 0, "batch_stats": 0},
            split_rngs={"params": True},
            in_axes=shared,
            axis_size=2,
        )
        made: Any = several(self.norm)
        return made(x, train)


class NnxCNN(nnx.Module):
    """Four convolutions with norm and ReLU, and a linear readout."""

    def __init__(self, norm: Any):
        rngs = nnx.Rngs(0)
        widths = (3, 16, 16, 32, 32)
        self.convs = nnx.List(
            nnx.Conv(a, b, (3, 3), rngs=rngs) for a, b in itertools.pairwise(widths)
        )
        # The norms have their own keys, so that the other layers do not depend on them.
        self.norms = nnx.List(norm(width, rngs=nnx.Rngs(0)) for width in widths[1:])
        self.readout = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.readout(x.mean((1, 2)))


# --- Programs ------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A function to be compiled, and the maker of its arguments.

    The function of a training step is (state, x, labels) -> (state, loss).
    """

    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]


def one_layer(norm: Any, dtype: str = "float32", shape: tuple[int, ...] = (256, 128)) -> Program:
    """Makes the program (params, stats, x, dy) -> (y, new stats, gradients of params and x)."""
    layer = norm(use_running_average=False, dtype=jnp.dtype(dtype))

    def arguments() -> tuple[Any, ...]:
        x, dy = (jax.random.normal(jax.random.key(seed), shape, dtype) for seed in (0, 1))
        variables = layer.init(jax.random.key(2), x)
        return variables["params"], variables["batch_stats"], x, dy

    def function(params, stats, x, dy):
        def apply(params, x):
            variables = {"params": params, "batch_stats": stats}
            return layer.apply(variables, x, mutable=["batch_stats"])

        y, pull, new = jax.vjp(apply, params, x, has_aux=True)
        return y, new, pull(dy)

    return Program(function, arguments)


def cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()


def squared_error(values: jax.Array, labels: jax.Array) -> jax.Array:
    """Returns the mean squared error of values [critics, N]; labels [N] stand for rewards."""
    return ((values - labels.astype(values.dtype)[None]) ** 2).mean()


def inputs(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Makes random x of that shape, and one of ten labels for each example."""
    return jax.random.normal(jax.random.key(1), shape), jnp.arange(shape[0]) % 10


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def linen_step(
    norm: Any,
    make: Callable[..., nn.Module],
    shape: tuple[int, ...],
    loss_of: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> Program:
    """Makes the training step of ``make(norm=norm)``, called as (x, train), for x of that shape."""
    net = make(norm=norm)

    def arguments() -> tuple[Any, ...]:
        x, labels = inputs(shape)
        variables = net.init(jax.random.key(0), x, train=False)
        params = variables["params"]
        return (params, variables["batch_stats"], OPTIMIZER.init(params)), x, labels

    def step(state, x, labels):
        params, stats, opt_state = state

        def loss(params):
            variables = {"params": params, "batch_stats": stats}
            out, new = net.apply(variables, x, train=True, mutable=["batch_stats"])
            return loss_of(out, labels), new["batch_stats"]

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    return Program(step, arguments)


def nnx_step(
    norm: Any, make: Callable[[Any], nnx.Module] = NnxCNN, shape: tuple[int, ...] = (8, 16, 16, 3)
) -> Program:
    """Makes the training step of ``make(norm)`` as a pure function: split, merge, split."""

    def split() -> Any:
        return nnx.split(make(norm), nnx.Param, nnx.BatchStat)

    graph = nnx.graphdef(make(norm))

    def arguments() -> tuple[Any, ...]:
        _, params, stats = split()
        return (params, stats, OPTIMIZER.init(params)), *inputs(shape)

    def step(state, x, labels):
        params, stats, opt_state = state

        def loss(params):
            net: Any = nnx.merge(graph, params, stats, copy=True)
            return cross_entropy(net(x), labels), nnx.state(net, nnx.BatchStat)

        (value, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        updates, opt_state = OPTIMIZER.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), stats, opt_state), value

    return Program(step, arguments)


class Model(NamedTuple):
    """A model that is built once with each norm."""

    program: Callable[[Any], Program]  # norm -> program
    norms: int  # how many layers of Batch Normalization it has
    api: str = "linen"  # a name in NORMS
    dtypes: Sequence[str] = ("float32",)  # if there are several, the program takes ``dtype``


def images(make: Callable[..., nn.Module], shape: tuple[int, ...] = (8, 16, 16, 3)) -> Any:
    return functools.partial(linen_step, make=make, shape=shape)


_resnet = functools.partial(resnet.ResNet, widths=(16, 32), blocks=(2, 2))
_critics = functools.partial(linen_step, make=Critics, shape=(64, 24), loss_of=squared_error)

MODELS: dict[str, Model] = {
    "layer": Model(one_layer, 1, dtypes=("float32", "bfloat16")),
    "cnn": Model(images(CNN, (8, 28, 28, 1)), 2),
    "resnet": Model(images(_resnet), 10),
    "densenet": Model(images(DenseNet), 12),
    "efficientnet": Model(images(EfficientNet), 12),
    "regnet": Model(images(RegNet), 12),
    "scanned": Model(images(Scanned), 2),
    "critic": Model(_critics, 3),
    "nnx": Model(nnx_step, 4, "nnx"),
    "resnet50": Model(images(resnet.ResNet50, (8, 64, 64, 3)), 53),
}
SLOW = ("resnet50",)
QUICK = ("layer", "critic")


def programs(name: str, dtype: str) -> dict[str, Program]:
    """Makes the same model with Flax's norm and with jbn's."""
    model = MODELS[name]
    kwargs = {"dtype": dtype} if len(model.dtypes) > 1 else {}
    return {k: model.program(norm, **kwargs) for k, norm in NORMS[model.api].items()}
