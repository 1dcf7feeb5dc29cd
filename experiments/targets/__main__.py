"""What would the layer cost on an H100 or a TPU? XLA's compilers answer, without the hardware.

Compiles jbn beside flax.linen for devices that need not be there, and reads the programs:

op         one layer, forward and backward in one program: BN, BN+ReLU, BN+add+ReLU, on shapes of
           ResNet-50 at batch 128
step       the whole training step of ResNet-50 (v1.5, batch 128, bfloat16, SGD with momentum): with
           jbn in the place of Flax's layer and no more; with the ReLU and the addition in the
           layer; and with `jbn.checkpoint_policy` over the net and over every block

and counts kernels (steps of the program that launch something), bytes moved, temporaries, and the
seconds that compiling took here. Bytes are XLA's own count, "bytes accessed", or, for GPUs, where
there is none, those of the operands and results of every kernel (`hlo.kernels`).

Claim: for GPUs and CPUs jbn moves no more bytes than Flax, but for the rows of checkpointing, which
save memory; for TPUs 1.00 to 1.01 times as many.

Command::

    python -m experiments.targets --target h100               # five minutes on two CPU cores
    python -m experiments.targets --target v5e --part step    # 20 minutes and more
    python -m experiments.targets --target v5e --part op      # about two minutes
    python -m experiments.targets --target cpu --part step --batch 64 --dtype float32

Expected: see docs/performance.md. Compiling is timed once, on a machine that does other things.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.util
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import jbn
from experiments.common import hlo
from experiments.common.records import Records

# --- Devices that need not be there --------------------------------------------------------------

# What XLA has to know of a GPU that it cannot ask: NVIDIA's H100 with 80 GB, in protobuf's text.
H100 = """
gpu_device_info {
  cuda_compute_capability { major: 9 minor: 0 }
  threads_per_warp: 32
  threads_per_block_limit: 1024
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  shared_memory_per_block: 49152
  shared_memory_per_block_optin: 232448
  shared_memory_per_core: 233472
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  clock_rate_ghz: 1.98
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""
ONE_CHIP = {
    "v5e": "v5e:2x2",
    "v5p": "v5p:2x2x1",
    "v6e": "v6e:2x2",
}  # the smallest that libtpu knows
NAMES = ("h100", *ONE_CHIP, "cpu")


def device(name: str) -> Any:
    """One device of the kind, which need not be there.

    Raises:
      ImportError: XLA's compiler for it is not installed.
    """
    if name == "cpu":
        return jax.devices("cpu")[0]
    return gpu() if name == "h100" else tpus(ONE_CHIP[name])[0]


def gpu() -> Any:
    """An H100."""
    plugins = importlib.util.find_spec("jax_plugins")
    if plugins is None or importlib.util.find_spec("jax_plugins.xla_cuda12") is None:
        raise ImportError(
            "target h100 needs XLA's compiler for GPUs, which runs without a GPU: "
            'pip install "jax[cuda12]" (3 GB).'
        )
    config = {"topology": "1x1x1", "target_config": H100}
    return topologies.get_topology_desc("", "cuda", **config).devices[0]


def tpus(topology: str) -> Sequence[Any]:
    """The devices of a TPU pod such as "v5e:16x16".

    Raises:
      ImportError: libtpu is not installed.
      ValueError: it has no such devices.
    """
    if importlib.util.find_spec("libtpu") is None:
        raise ImportError(
            f"target {topology} needs XLA's compiler for TPUs, which runs without a TPU: "
            f"pip install libtpu, or use --target cpu."
        )
    try:
        with quiet():
            return topologies.get_topology_desc(topology, "tpu").devices
    except jax.errors.JaxRuntimeError as error:
        raise ValueError(
            f"libtpu has no devices for target {topology!r}: {error}. Expected cpu, or a "
            f"generation and a shape such as v5e:2x2, v5e:16x16, v5p:4x4x4 or v6e:16x16."
        ) from None


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libtpu, a C++ library, writes to stderr when it finds no TPU."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


def prepare(cpu_devices: int = 1) -> None:
    """Has to run before JAX looks for devices."""
    jax.config.update("jax_platforms", "cpu")
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", cpu_devices)
    os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # do not ask a cloud which TPU this is
    os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # there is no TPU to quarrel over
    os.environ.setdefault("JAX_SKIP_CUDA_CONSTRAINTS_CHECK", "1")  # nor a GPU with a driver


def version(package: str) -> str | None:
    """The installed version of a package, if it is installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# --- Programs ------------------------------------------------------------------------------------

LIBRARIES = ("flax.linen", "jbn")
FORMS = ("bn", "bn_relu", "bn_add_relu")
DTYPES = ("bfloat16", "float32")
# Of the 12 shapes [H, W, C] after a convolution of ResNet-50: large, small, wide and narrow.
SHAPES = ((112, 112, 64), (56, 56, 64), (56, 56, 256), (28, 28, 512), (14, 14, 256), (7, 7, 2048))
BATCH = 128

Compile = Callable[[str], Any]  # name of a target -> jax.stages.Compiled


class Program(NamedTuple):
    """A line of the table, before it is compiled."""

    part: str  # "op" or "step"
    case: str  # shape of x, or the network
    dtype: str
    form: str  # one of FORMS; "-" of a step
    library: str
    elements: int | None  # of x
    function: Callable[[], tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]]


def op(batch: int, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[str]) -> Iterator[Program]:
    """One layer in training, forward and backward."""
    from experiments.speed.peers import Case

    for dtype in dtypes:
        for form in FORMS:
            for shape in shapes:
                case = Case((batch, *shape), dtype, form)
                about = "x".join(map(str, case.shape)), dtype, form
                for library in LIBRARIES:
                    function = functools.partial(layer, library, case)
                    yield Program("op", *about, library, case.elements, function)


def layer(library: str, case: Any) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """A layer of one of the libraries, the shapes of its arguments, and no donated ones."""
    from experiments.speed import peers

    nothing = np.broadcast_to(np.float32(0), case.shape)  # only its shape is looked at
    channels = np.ones(case.shape[-1], np.float32)
    make = peers.PEERS[library].layer
    assert make is not None
    made = make(case, peers.Data(nothing, nothing, nothing, channels, channels))
    x = jax.ShapeDtypeStruct(case.shape, case.dtype)
    residual = x if case.form == "bn_add_relu" else None
    return peers.function_of(made, case.which), (made.params, made.stats, x, residual, x), ()


def step(batch: int, dtypes: Sequence[str], quick: bool = False) -> Iterator[Program]:
    """The training step of ResNet-50, in several forms; quick: of one block of it."""
    from experiments.nets.resnet import BottleneckBlock, ResNet, ResNet50

    one_block = functools.partial(ResNet, (4,), (1,), block=BottleneckBlock)
    network, size = (one_block, 8) if quick else (ResNet50, 224)
    case = f"{'one block' if quick else 'ResNet-50'}, batch {batch}"
    for dtype in dtypes:
        for name, (slot, make) in networks(network).items():
            function = functools.partial(training, slot, make, batch, size, dtype)
            yield Program("step", case, dtype, "-", name, None, function)


def networks(
    network: Callable[..., linen.Module],
) -> dict[str, tuple[str, Callable[..., linen.Module]]]:
    """Name of a row -> (what goes into the network's slots, the network)."""
    from experiments.nets.resnet import BottleneckBlock

    def checkpointed(network: Callable[..., linen.Module], **slots: Any) -> linen.Module:
        return Checkpointed(functools.partial(network, **slots))

    lean = linen.remat(BottleneckBlock, policy=jbn.checkpoint_policy)
    blocks = functools.partial(network, block=lean)
    return {
        "flax.linen": ("flax.linen", network),
        "jbn drop-in": ("jbn drop-in", network),
        "jbn": ("jbn", network),
        "jbn, policy": ("jbn", functools.partial(checkpointed, network)),
        "jbn, policy per block": ("jbn", blocks),
        # The inner one keeps a block's recomputation from starting before its gradient is there.
        "jbn, policy, both": ("jbn", functools.partial(checkpointed, blocks)),
    }


class Checkpointed(linen.Module):
    """A network of which a training step keeps what `jbn.checkpoint_policy` says."""

    make: Callable[[], linen.Module]

    @linen.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        def whole(net: Any, x: jax.Array) -> jax.Array:
            return net(x, train)

        return linen.remat(whole, policy=jbn.checkpoint_policy)(self.make(), x)


def training(
    slot: str, make: Callable[..., linen.Module], batch: int, size: int, dtype: str
) -> tuple[Callable[..., Any], tuple[Any, ...], tuple[int, ...]]:
    """A training step, the shapes of its arguments, and that the first is donated."""
    from experiments.speed import __main__ as speed

    made = speed.Network("ResNet-50", make, size, batch, dtype).training(speed.SLOTS[slot])
    return made.step, (made.state, made.images, made.labels), (0,)


# --- The measurement -----------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table."""

    target: str
    part: str
    case: str
    dtype: str
    form: str
    library: str
    kernels: int
    moved: int  # bytes
    temporaries: int  # bytes
    compiling: float  # seconds
    elements: int | None = None  # of x

    def same(self) -> tuple[str, ...]:
        """What the rows that are compared with each other have in common."""
        return self.target, self.part, self.case, self.dtype, self.form


def measure(target: str, on: Any, program: Program) -> Row:
    """Compiles a program for a device, and reads it."""
    function, arguments, donated = program.function()
    mesh = Mesh(np.asarray([on]), ("data",))
    everywhere = NamedSharding(mesh, P())

    def there(a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere)

    jitted = jax.jit(function, donate_argnums=donated)
    with jax.set_mesh(mesh):  # or jbn cuts the batch for as many devices as are here
        lowered = jitted.lower(*jax.tree.map(there, arguments))
    # There is no GPU on which kernels could be tried.
    options: Any = {"xla_gpu_autotune_level": "0"} if target == "h100" else None
    start = time.perf_counter()
    compiled = lowered.compile(compiler_options=options)
    seconds = time.perf_counter() - start
    kernels = hlo.kernels(compiled.as_text() or "")
    moved = (compiled.cost_analysis() or {}).get("bytes accessed") or sum(k.moved for k in kernels)
    memory = compiled.memory_analysis()
    assert memory is not None
    about = target, program.part, program.case, program.dtype, program.form, program.library
    numbers = len(kernels), int(moved), memory.temp_size_in_bytes, seconds
    return Row(*about, *numbers, program.elements)


# --- The table -----------------------------------------------------------------------------------

BASELINE = LIBRARIES[0]
COLUMNS = (
    "program", "dtype", "library", "kernels", "bytes moved", "of Flax's", "temporaries",
    "of Flax's", "compiling",
)  # fmt: skip
WORDS = 3  # columns; the others are numbers


def table(rows: Sequence[Row]) -> str:
    """Markdown that a terminal shows well, too: a table for each target."""
    baselines = {row.same(): row for row in rows if row.library == BASELINE}
    parts = []
    for target in dict.fromkeys(row.target for row in rows):
        own = [row for row in rows if row.target == target]
        cells = [COLUMNS, *(columns(row, baselines.get(row.same())) for row in own)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        rule = ["-"] * WORDS + ["-:"] * (len(COLUMNS) - WORDS)
        lines = [aligned(line, widths) for line in cells]
        lines.insert(1, aligned(rule, widths, fill="-"))
        parts.append(f"**{target}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines))
    return "\n\n".join(parts) + "\n"


def aligned(cells: Sequence[str], widths: Sequence[int], fill: str = " ") -> list[str]:
    """Words to the left, numbers to the right."""
    left = [cell.ljust(w, fill) for cell, w in zip(cells[:WORDS], widths[:WORDS], strict=True)]
    right = [cell.rjust(w, fill) for cell, w in zip(cells[WORDS:], widths[WORDS:], strict=True)]
    return left + right


def columns(row: Row, baseline: Row | None) -> tuple[str, ...]:
    """A line of the table."""
    form = "" if row.form == "-" else f", {row.form.replace('bn', 'BN').replace('_', '+')}"
    if row.elements:
        moved = f"{row.moved / row.elements:.2f} B/element"
        temporaries = f"{row.temporaries / row.elements:.2f} B/element"
    else:
        moved, temporaries = f"{row.moved / 1e9:.2f} GB", f"{row.temporaries / 2**30:.3f} GiB"
    ratios = [
        "-" if baseline is None else ratio(row, baseline, f) for f in ("moved", "temporaries")
    ]
    return (
        row.case + form,
        row.dtype,
        row.library,
        str(row.kernels),
        moved,
        ratios[0],
        temporaries,
        ratios[1],
        f"{row.compiling:.1f} s",
    )


def ratio(row: Row, baseline: Row, field: str) -> str:
    """The temporaries of a layer may be none, or a few vectors: then they have no ratio."""
    own, other = getattr(row, field), getattr(baseline, field)
    small = field == "temporaries" and row.elements and max(own, other) < row.elements / 10
    return "-" if small or not other else f"{own / other:.3f}"


# --- Command line --------------------------------------------------------------------------------


def parser() -> argparse.ArgumentParser:
    from experiments.speed.__main__ import positive  # which imports this file

    p = argparse.ArgumentParser(
        prog="python -m experiments.targets",
        description="Kernels, bytes moved and temporaries of jbn beside flax.linen, in programs "
        "that XLA compiles for devices which need not be there.",
    )
    add = p.add_argument
    add("--target", nargs="+", choices=NAMES, default=["cpu"], metavar="NAME",
        help=f"any of {', '.join(NAMES)}; default: cpu")  # fmt: skip
    add("--part", nargs="+", choices=("op", "step"), default=["op", "step"], help="default: both")
    add("--dtype", nargs="+", choices=DTYPES, metavar="DTYPE",
        help="default: both for op, bfloat16 for step")  # fmt: skip
    add("--batch", type=positive, default=BATCH, metavar="N", help=f"images; default: {BATCH}")
    add("--library", nargs="+", metavar="NAME", help="rows of these names only, such as jbn")
    add("--quick", action="store_true", help="one shape, and one block of the network")
    add("--markdown", type=Path, metavar="FILE", help="write the table there, too")
    add("--json", type=Path, metavar="FILE", help="write JSON lines there, one a row")
    return p


def programs(args: argparse.Namespace) -> list[Program]:
    """What the command line asks for."""
    found: list[Program] = []
    if "op" in args.part:
        shapes = SHAPES[-1:] if args.quick else SHAPES
        found += op(args.batch, shapes, args.dtype or DTYPES)
    if "step" in args.part:
        found += step(args.batch, args.dtype or DTYPES[:1], args.quick)
    names = {p.library for p in found}
    for name in args.library or ():
        if name not in names:
            sys.exit(f"error: --library {name}: expected some of {', '.join(sorted(names))}.")
    return [p for p in found if not args.library or p.library in args.library]


def main(argv: Sequence[str] | None = None) -> list[Row]:
    """Run from the command line, or from Python with a list of arguments; the rows."""
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    prepare()
    try:
        devices = {name: device(name) for name in args.target}
    except ImportError as error:
        sys.exit(f"error: {error}")
    cases = [(name, program) for name in devices for program in programs(args)]
    versions = {name: version(name) for name in ("jax", "libtpu", "jax-cuda12-plugin")}
    rows = []
    with contextlib.ExitStack() as files:
        records = None
        if args.json:
            command = shlex.join(["python", "-m", "experiments.targets", *argv])
            records = files.enter_context(Records(args.json, command=command, compilers=versions))
        for name, program in tqdm(cases, desc="compiling", file=sys.stderr, leave=False):
            rows.append(measure(name, devices[name], program))
            if records:
                records.write("target", **rows[-1]._asdict())
    print(table(rows), end="")
    if args.markdown:
        compilers = ", ".join(f"{package} {v}" for package, v in versions.items() if v)
        args.markdown.write_text(f"Compiled with {compilers}.\n\n{table(rows)}", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
