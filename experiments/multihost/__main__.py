"""Do several processes, as on a cluster, compute what one process does?

A small network with Batch Normalization learns to read digits. The batch is spread over all devices
of all processes; statistics and gradients are those of the whole batch, so the processes must end
with the same parameters and running statistics, bit for bit, and one process with as many devices
with the same up to the order of its sums.

On this machine, as a cluster in small (virtual CPU devices, nothing to download)::

    python -m experiments.multihost                                 # 2 processes x 2 devices
    python -m experiments.multihost --processes 4 --devices 1

Expected: accuracy on the training batches from chance to about 0.9 in 40 steps; "the processes
agree"; a difference from one process of about 1e-6. Half a minute on two CPU cores.

On a real cluster, the same command once on every machine::

    python -m experiments.multihost --coordinator HOST:PORT --num-processes 8 --process-id 0...7
    python -m experiments.multihost --auto      # SLURM, Open MPI, TPU pods, GKE: JAX finds out

HOST:PORT is a free port of the machine that runs process 0, which the others must reach. In a
program of your own it takes three things: ``jax.distributed.initialize``; a mesh of
``jax.devices()``, which are then those of all machines; and batches of which every process makes
its own part (``spread``).
"""

from __future__ import annotations

import argparse
import hashlib
import os
import socket
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jbn
from experiments.common import cluster
from experiments.images.digits import bundled_digits
from jbn import training

AXIS = "batch"
BATCH = 240  # images a step, over all devices
SIZES = (784, 64, 32, 10)
MODES = ("jit", "shard_map")  # two ways to spread a step over devices
TIMEOUT = 300  # seconds, for a process started here


def init(key: jax.Array) -> tuple[Any, Any]:
    """Parameters and running statistics."""
    keys = jax.random.split(key, len(SIZES) - 1)
    pairs = zip(keys, SIZES[:-1], SIZES[1:], strict=True)
    kernels = [jax.random.normal(k, (n, m)) / n**0.5 for k, n, m in pairs]
    hidden = SIZES[1:-1]
    params = {"kernels": kernels, "norms": [jbn.init_params(n) for n in hidden]}
    return params, [jbn.init_stats(n) for n in hidden]


def make_loss(axis_name: str | None) -> training.LossFn:
    """Cross-entropy of a network of dense layers; `axis_name` under shard_map."""

    def loss_fn(params: Any, stats: Any, batch: Any) -> tuple[Any, Any, Any]:
        x, new = batch["images"].astype(jnp.float32), []
        for kernel, norm, old in zip(params["kernels"], params["norms"], stats, strict=False):
            x, updated = jbn.batch_norm(x @ kernel, norm, old, axis_name=axis_name)
            x = jax.nn.relu(x)
            new.append(updated)
        logits = x @ params["kernels"][-1]
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"])
        accuracy = (logits.argmax(-1) == batch["labels"]).mean(dtype=jnp.float32)
        return losses.mean(), new, {"accuracy": accuracy}

    return loss_fn


def spread(batch: Any, mesh: Mesh) -> Any:
    """Global arrays over the mesh; every process provides the rows of its own devices."""
    sharding = NamedSharding(mesh, P(AXIS))

    def place(values: np.ndarray) -> jax.Array:
        return jax.make_array_from_callback(values.shape, sharding, lambda index: values[index])

    return jax.tree.map(place, batch)


def train(mesh: Mesh, mode: str, steps: int, *, quiet: bool = True) -> training.TrainState:
    """The state after `steps` steps on all devices of the mesh."""
    optimizer = optax.sgd(0.1, momentum=0.9)
    axis_name = AXIS if mode == "shard_map" else None
    step = training.make_train_step(
        make_loss(axis_name), optimizer, axis_name=axis_name, microbatches=2
    )
    if mode == "shard_map":
        step = jax.shard_map(step, mesh=mesh, in_specs=(P(), P(AXIS)), out_specs=P())
    step = jax.jit(step, donate_argnums=0)
    everywhere = NamedSharding(mesh, P())

    def start() -> training.TrainState:
        return training.init(*init(jax.random.key(0)), optimizer)

    state = jax.jit(start, out_shardings=everywhere)()
    digits = bundled_digits()
    rng = np.random.default_rng(0)  # the same order in every process
    with jax.set_mesh(mesh):
        for i in range(steps):
            rows = rng.choice(len(digits.train_labels), BATCH, replace=False)
            batch = {"images": digits.train_images[rows], "labels": digits.train_labels[rows]}
            state, metrics = step(state, spread(batch, mesh))
            if not quiet and (i + 1) % 10 == 0:
                print(
                    f"{mode:9} step {i + 1:3}: loss {metrics['loss']:.4f}, "
                    f"accuracy {metrics['accuracy']:.3f}",
                    flush=True,
                )
    return state


def fingerprint(state: training.TrainState) -> str:
    """A hash of all numbers: equal if and only if they are, bit for bit."""
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()[:16]


def work(args: argparse.Namespace) -> None:
    """One process of several: trains with the others, and saves what it ends with."""
    if args.out is not None and not args.out.is_dir():
        sys.exit(f"--out {args.out} is no folder: make it first.")
    cluster.join(args)
    i, n = jax.process_index(), jax.process_count()
    print(f"process {i} of {n}: {jax.local_device_count()} of {jax.device_count()} devices")
    mesh = jax.make_mesh((jax.device_count(),), (AXIS,), (AxisType.Auto,))
    for mode in MODES:
        state = train(mesh, mode, args.steps, quiet=i != 0)
        print(f"process {i}, {mode}: parameters and statistics {fingerprint(state)}", flush=True)
        if args.out is not None:
            leaves = [np.asarray(leaf) for leaf in jax.tree.leaves(state)]
            np.savez(args.out / f"{mode}-{i}.npz", *leaves)


def launch(processes: int, devices: int, steps: int, out: Path) -> list[str]:
    """Starts `processes` processes on this machine, with virtual devices; returns their output.

    Raises:
      RuntimeError: one of them failed, or hung for `TIMEOUT` seconds; with what all of them said.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    command = [sys.executable, "-m", "experiments.multihost", "--steps", str(steps)]
    command += ["--out", str(out), "--coordinator", f"localhost:{port}"]
    started = [
        subprocess.Popen(
            [*command, "--num-processes", str(processes), "--process-id", str(i)],
            cwd=Path(__file__).parents[2],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(processes)
    ]
    said, failed = [], True
    try:
        said = [process.communicate(timeout=TIMEOUT)[0] for process in started]
        failed = any(process.returncode for process in started)
    except subprocess.TimeoutExpired:
        pass
    if failed:  # one that died leaves the others waiting for it
        for process in started:
            process.kill()
        said = [process.communicate()[0] or "" for process in started]
        everything = "\n".join(f"--- process {i}\n{text}" for i, text in enumerate(said))
        raise RuntimeError(f"the {processes} processes did not all succeed:\n{everything}")
    return said


def read(out: Path, mode: str, process: int) -> list[np.ndarray]:
    """The leaves of the TrainState that a process ended with."""
    with np.load(out / f"{mode}-{process}.npz") as saved:
        return list(saved.values())


def largest_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Of any two numbers, relative to the largest of their array."""
    pairs = zip(a, b, strict=True)
    return max(float(np.max(np.abs(x - y)) / (np.max(np.abs(y)) or 1)) for x, y in pairs)


def compare(args: argparse.Namespace) -> int:
    """Several processes here, and one process with as many devices; what they end with."""
    with tempfile.TemporaryDirectory() as directory:
        several, one = Path(directory, "several"), Path(directory, "one")
        several.mkdir()
        one.mkdir()
        print(f"{args.processes} processes of {args.devices} devices each")
        print("".join(launch(args.processes, args.devices, args.steps, several)), end="")
        print(f"one process of {args.processes * args.devices} devices")
        print("".join(launch(1, args.processes * args.devices, args.steps, one)), end="")
        agree = True
        for mode in MODES:
            ends = [read(several, mode, i) for i in range(args.processes)]
            equal = all(
                np.array_equal(x, y) for end in ends for x, y in zip(end, ends[0], strict=True)
            )
            difference = largest_difference(ends[0], read(one, mode, 0))
            agree &= equal and difference < 1e-3
            print(
                f"{mode}: the processes {'agree' if equal else 'DIFFER'} bit for bit; "
                f"from one process they differ by {difference:.1e}"
            )
    return 0 if agree else 1


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m experiments.multihost",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=40, help="training steps (40)")
    here = parser.add_argument_group("start processes on this machine")
    here.add_argument("--processes", type=int, default=2, help="how many (2)")
    here.add_argument("--devices", type=int, default=2, help="virtual CPU devices of each (2)")
    several = parser.add_argument_group("be one process of several")
    cluster.add_options(several)
    several.add_argument("--out", type=Path, help="save the final state in this folder")
    args = parser.parse_args(argv)
    cluster.check(parser, args)
    if BATCH % (2 * args.processes * args.devices):
        parser.error(f"processes x devices must divide {BATCH // 2}, half of the batch")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    if args.auto or args.coordinator is not None:
        work(args)
        return 0
    return compare(args)


if __name__ == "__main__":
    sys.exit(main())
