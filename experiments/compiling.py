"""How long do tracing, lowering and compiling take with jbn's layer in the place of Flax's?

Each model is built twice, with Flax's BatchNorm and with jbn's; all else is shared. The program is
a whole training step (loss, gradients, new statistics, SGD), of a layer alone its forward and
backward. It is traced, lowered and compiled, and not run:

layer              one layer, 256 x 128, in float32 and in bfloat16
cnn                two convolutions and two dense layers, as in Flax's example for MNIST
resnet             basic blocks, ReLU behind the norm
densenet           the norm before the convolution, concatenation: every norm has another width
efficientnet       depthwise convolutions, swish
regnet             grouped convolutions
scanned            blocks of one shape under `flax.linen.scan`
critic             two critics of reinforcement learning, small layers under `flax.linen.vmap`
nnx                a convolutional network in Flax nnx
resnet50           ResNet-50 for 64 x 64 pixels; slow, so it is measured only if it is named

The two take turns in one process, in another order each round, from empty caches; in one more round
before these Python itself warms up. Garbage is collected before each measurement and not in it.
Seconds are of the CPU, summed over all threads of the process (`time.process_time`): on a machine
that does other things the time on the wall measures those, too, and XLA compiles on several
threads, all of which cost. Ratios are jbn : Flax within a round, median (quartiles).

Sizes: equations of the jaxpr, with those inside of calls and loops; StableHLO operations and lines
of text before XLA optimises; instructions after it.

Command::

    python -m experiments.speed --part compile                      # five minutes on two CPU cores
    python -m experiments.speed --part compile --quick              # a few seconds
    python -m experiments.speed --part compile --models resnet50
    python -m experiments.speed --part compile --models layer resnet --target h100 v5e

A target need not be there; `experiments.targets` says what has to be installed.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from rich.console import Console
from tqdm import tqdm

import jbn.linen
import jbn.nnx
from experiments import hlo, models, peers, speed_report, targets, timing
from experiments.records import Records

FLAX, JBN = "flax", "jbn"
NORMS: dict[str, dict[str, Any]] = {
    "linen": {FLAX: nn.BatchNorm, JBN: jbn.linen.BatchNorm},
    "nnx": {FLAX: nnx.BatchNorm, JBN: jbn.nnx.BatchNorm},
}
PHASES = ("trace", "lower", "compile")
ALL = "in all"

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
    """Each layer sees the concatenation of all before it, and adds `growth` channels."""

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
    """Residual blocks of one shape, whose parameters and statistics lie along a first axis."""

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
        x, _ = scan(models.ResidualBlock(self.width, norm=norm), x, None)
        return nn.Dense(10)(x.mean((1, 2)))


class Critic(nn.Module):
    """A norm on the input and behind each hidden layer."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        x = self.norm(use_running_average=not train)(x)
        for features in (64, 64):
            x = self.norm(use_running_average=not train)(nn.relu(nn.Dense(features)(x)))
        return nn.Dense(1)(x)[..., 0]


class Critics(nn.Module):
    """Two critics of the same inputs; the mean of what they say, one number an example."""

    norm: Any

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        shared: Any = None  # the axis of x; the annotation of Flax's argument knows numbers only
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
        # With keys of their own: how many of them a norm takes says nothing about the others.
        self.norms = nnx.List(norm(width, rngs=nnx.Rngs(0)) for width in widths[1:])
        self.readout = nnx.Linear(widths[-1], 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = nnx.relu(norm(conv(x)))
        return self.readout(x.mean((1, 2)))


# --- Programs ------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A function to be compiled, and what makes its arguments.

    Of a training step the function is (state, x, labels) -> (state, loss).
    """

    function: Callable[..., Any]
    arguments: Callable[[], tuple[Any, ...]]


def one_layer(norm: Any, dtype: str = "float32", shape: tuple[int, ...] = (256, 128)) -> Program:
    """(params, stats, x, dy) -> (y, new stats, gradients of params and x)."""
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
    """Of values [critics, N]; the labels [N] stand for rewards."""
    return ((values - labels.astype(values.dtype)[None]) ** 2).mean()


def inputs(shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Random x of that shape, and a label of ten for each example."""
    return jax.random.normal(jax.random.key(1), shape), jnp.arange(shape[0]) % 10


OPTIMIZER = optax.sgd(0.1, momentum=0.9)


def linen_step(
    norm: Any,
    make: Callable[..., nn.Module],
    shape: tuple[int, ...],
    loss_of: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy,
) -> Program:
    """The training step of ``make(norm=norm)``, called as (x, train), for x of that shape."""
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
    """The training step of ``make(norm)`` as a pure function: split, merge, split."""

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
    """What is built once with each norm."""

    program: Callable[[Any], Program]  # of the norm
    norms: int  # how many layers of Batch Normalization it has
    api: str = "linen"  # a name in NORMS
    dtypes: Sequence[str] = ("float32",)  # several: the program takes ``dtype``, too


def images(make: Callable[..., nn.Module], shape: tuple[int, ...] = (8, 16, 16, 3)) -> Any:
    return functools.partial(linen_step, make=make, shape=shape)


_resnet = functools.partial(models.ResNet, widths=(16, 32), blocks=(2, 2))
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
    "resnet50": Model(images(models.ResNet50, (8, 64, 64, 3)), 53),
}
SLOW = ("resnet50",)
QUICK = ("layer", "critic")


# --- The measurement -----------------------------------------------------------------------------


class Sizes(NamedTuple):
    """What a program consists of."""

    equations: int  # of the jaxpr
    operations: int  # StableHLO's, with functions, calls and returns
    lines: int  # of StableHLO's text
    instructions: int  # after XLA's optimisation


class Stages(NamedTuple):
    """A program in its three forms, and the seconds that each took."""

    traced: Any
    lowered: Any
    compiled: Any
    seconds: dict[str, float]  # of PHASES, and ALL


class Case(NamedTuple):
    """One model in one dtype, compiled for one device."""

    target: str
    model: str
    dtype: str
    norms: int
    seconds: dict[str, list[dict[str, float]]]  # library -> for each round, those of `Stages`
    sizes: dict[str, Sizes]  # library -> sizes

    def ratio(self, phase: str) -> timing.Ratio:
        """jbn : Flax, within the rounds."""
        return self._samples(phase).ratio(JBN, FLAX)

    def median(self, library: str, phase: str = ALL) -> float:
        return self._samples(phase).median(library)

    def _samples(self, phase: str) -> timing.Samples:
        return timing.Samples({k: [s[phase] for s in v] for k, v in self.seconds.items()})


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Collects garbage, and then none until the block ends: it would be charged to either side."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def stages(program: Program, shapes: tuple[Any, ...], on: Any, options: Any = None) -> Stages:
    """Traces, lowers and compiles from empty caches, for a device that need not be there.

    shapes: of the arguments. options: XLA's, for compiling.
    """
    mesh = Mesh(np.asarray([on]), ("data",))
    everywhere = NamedSharding(mesh, P())
    there = jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere), shapes
    )
    jax.clear_caches()
    with uncollected(), jax.set_mesh(mesh):  # or jbn cuts the batch for as many devices as are here
        clock = [time.process_time()]
        traced = jax.jit(program.function).trace(*there)
        clock.append(time.process_time())
        lowered = traced.lower()
        clock.append(time.process_time())
        compiled = lowered.compile(compiler_options=options)
        clock.append(time.process_time())
    seconds = dict(zip(PHASES, np.diff(clock).tolist(), strict=True))
    return Stages(traced, lowered, compiled, {**seconds, ALL: clock[-1] - clock[0]})


def sizes(found: Stages) -> Sizes:
    """Counts what the three forms of a program consist of."""
    instructions = hlo.computations(found.compiled.as_text() or "").values()
    return Sizes(
        sum(1 for _ in equations(found.traced.jaxpr.jaxpr)),
        sum(1 for _ in operations(found.lowered.compiler_ir("stablehlo").operation)),
        len(found.lowered.as_text().splitlines()),
        sum(map(len, instructions)),
    )


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """Yields the equations of a jaxpr and of those that they call."""
    yield from jaxpr.eqns
    for inner in jax.extend.core.subjaxprs(jaxpr):
        yield from equations(inner)


def operations(operation: Any) -> Iterator[str]:
    """Yields the names of the operations inside one of MLIR's, such as a module."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation.name
                yield from operations(inner.operation)


def programs(name: str, dtype: str) -> dict[str, Program]:
    """The same model with Flax's norm and with jbn's."""
    model = MODELS[name]
    kwargs = {"dtype": dtype} if len(model.dtypes) > 1 else {}
    return {k: model.program(norm, **kwargs) for k, norm in NORMS[model.api].items()}


def measure(name: str, dtype: str, rounds: int, target: str, on: Any) -> Case:
    """Both programs of a model in turn, after a round that warms up and in which sizes are read."""
    made = programs(name, dtype)
    shapes = {library: jax.eval_shape(p.arguments) for library, p in made.items()}
    # There is no GPU on which kernels could be tried.
    options = {"xla_gpu_autotune_level": "0"} if target == "h100" else None
    found: dict[str, Sizes] = {}
    seconds: dict[str, list[dict[str, float]]] = {library: [] for library in made}
    for number in range(rounds + 1):
        for library in list(made)[:: 1 if number % 2 else -1]:
            with peers.PEERS["jbn"].setting():  # XLA's sums
                one = stages(made[library], shapes[library], on, options)
            if number:
                seconds[library].append(one.seconds)
            else:
                found[library] = sizes(one)
            del one
    return Case(target, name, dtype, MODELS[name].norms, seconds, found)


# --- The table -----------------------------------------------------------------------------------


def table(cases: Sequence[Case]) -> speed_report.TableText:
    """Ratios jbn : Flax of a target's cases, the sizes of both, and the geometric means."""
    header = ["case", "dtype", "norms", *PHASES, ALL, "seconds", *Sizes._fields]
    cells = []
    for case in cases:
        line = [case.model, case.dtype, str(case.norms)]
        line += [ratio_text(case.ratio(phase)) for phase in (*PHASES, ALL)]
        line.append(f"{case.median(JBN):.2f} : {case.median(FLAX):.2f}")
        pairs = zip(case.sizes[JBN], case.sizes[FLAX], strict=True)
        cells.append([*line, *(f"{own} : {other}" for own, other in pairs)])
    means = [
        timing.geometric_mean(case.ratio(phase).median for case in cases)
        for phase in (*PHASES, ALL)
    ]
    of_sizes = [
        timing.geometric_mean(c.sizes[JBN][i] / c.sizes[FLAX][i] for c in cases)
        for i in range(len(Sizes._fields))
    ]
    numbers = [*means, None, *of_sizes]
    cells.append(["mean", "-", "-", *("-" if n is None else f"{n:.2f}" for n in numbers)])
    return speed_report.TableText(f"compile, {cases[0].target}", header, cells)


def ratio_text(ratio: timing.Ratio) -> str:
    """A ratio and its quartiles, "1.20 (1.18-1.23)"."""
    return f"{ratio.median:.2f} ({ratio.low:.2f}-{ratio.high:.2f})"


NOTE = (
    "Ratios of CPU seconds, jbn : Flax, within rounds: median (quartiles). seconds: in all, "
    "medians. Sizes, jbn : Flax: the jaxpr's equations; StableHLO's operations and lines; XLA's "
    "optimised instructions. mean: geometric, of the ratios."
)


# --- Command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    from experiments.speed import positive  # which imports this file

    p = argparse.ArgumentParser(
        prog="python -m experiments.speed --part compile",
        description="Tracing, lowering and compiling of training steps with jbn's layer beside "
        "Flax's, and the sizes of the programs.",
    )
    add = p.add_argument
    add("--part", nargs="+", choices=("compile",), default=["compile"], help="this one")
    default = [name for name in MODELS if name not in SLOW]
    add("--models", nargs="+", choices=MODELS, default=default, metavar="NAME",
        help=f"of {', '.join(MODELS)}; default: all but {', '.join(SLOW)}")  # fmt: skip
    add("--rounds", type=positive, default=3, metavar="N", help="default: 3")
    add("--quick", action="store_true", help=f"{' and '.join(QUICK)} alone, one round")
    add("--target", nargs="+", choices=targets.NAMES, metavar="NAME",
        help=f"compile for these, of {', '.join(targets.NAMES)}, which need not be there; "
        "default: JAX's default device")  # fmt: skip
    add("--out", type=Path, default=Path("results/speed"), metavar="DIR",
        help="for compile.jsonl; default: results/speed")  # fmt: skip
    add("--markdown", type=Path, metavar="FILE", help="write the tables there, too")
    return p


def devices(names: Sequence[str] | None) -> Mapping[str, Any]:
    """Name -> device, of the named targets or of the default device."""
    if not names:
        return {jax.default_backend(): jax.devices()[0]}
    targets.prepare()
    return {name: targets.device(name) for name in names}


def main(argv: Sequence[str] | None = None) -> list[Case]:
    """Run from the command line, or from Python with arguments; returns the cases."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    try:
        on = devices(args.target)
    except ImportError as error:
        sys.exit(f"error: {error}")
    names, rounds = (QUICK, 1) if args.quick else (args.models, args.rounds)
    todo = [(t, name, dtype) for t in on for name in names for dtype in MODELS[name].dtypes]
    command = shlex.join(["python", "-m", "experiments.speed", *argv])
    cases = []
    with Records(args.out / "compile.jsonl", command=command) as records:
        for target, name, dtype in tqdm(todo, desc="compile", file=sys.stderr, leave=False):
            case = measure(name, dtype, rounds, target, on[target])
            counted = {library: s._asdict() for library, s in case.sizes.items()}
            ratios = {phase: case.ratio(phase)._asdict() for phase in (*PHASES, ALL)}
            fields = case._replace(sizes={})._asdict()
            records.write("compile", **{**fields, "sizes": counted, "ratios": ratios})
            cases.append(case)
    tables = [table([case for case in cases if case.target == target]) for target in on]
    console = Console(width=None if sys.stdout.isatty() else 200)
    for one in tables:
        console.print(speed_report.terminal_table(one))
    console.print(NOTE, markup=False)
    if args.markdown:
        text = "\n".join(map(speed_report.markdown_table, tables))
        args.markdown.write_text(f"`{command}`. {NOTE}\n\n{text}", encoding="utf-8")
    print(f"numbers: {args.out / 'compile.jsonl'}")
    return cases
