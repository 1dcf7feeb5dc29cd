"""Starts several processes on this machine, and reads and compares their final states."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

TIMEOUT = 300  # seconds, for a process started here


def launch(processes: int, devices: int, steps: int, out: Path) -> list[str]:
    """Starts `processes` processes on this machine, with virtual devices; returns their output.

    Raises:
      RuntimeError: one of them failed, or hung for `TIMEOUT` seconds; with the output of all.
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
    if failed:  # the other processes wait for one that died
        for process in started:
            process.kill()
        said = [process.communicate()[0] or "" for process in started]
        everything = "\n".join(f"--- process {i}\n{text}" for i, text in enumerate(said))
        raise RuntimeError(f"the {processes} processes did not all succeed:\n{everything}")
    return said


def read(out: Path, mode: str, process: int) -> list[np.ndarray]:
    """Reads the leaves of a process' final TrainState."""
    with np.load(out / f"{mode}-{process}.npz") as saved:
        return list(saved.values())


def largest_difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> float:
    """Returns the largest difference of two numbers, relative to the largest of their array."""
    pairs = zip(a, b, strict=True)
    return max(float(np.max(np.abs(x - y)) / (np.max(np.abs(y)) or 1)) for x, y in pairs)
