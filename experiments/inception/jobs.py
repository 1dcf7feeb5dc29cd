"""Runs several jobs on one machine, each with one thread."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from experiments.inception.runs import Run


def deal(chosen: list[Run], jobs: int) -> list[list[Run]]:
    """Deals the runs, each to the job that has the fewest steps so far."""
    hands: list[list[Run]] = [[] for _ in range(jobs)]
    for run in chosen:
        min(hands, key=lambda hand: sum(r.steps for r in hand)).append(run)
    return hands


def spawn(argv: Sequence[str], jobs: int, out: Path) -> None:
    """Starts the jobs on this machine, each with one thread, and waits for all of them.

    The layers are small: two jobs of one thread are almost twice as fast as one job of two.
    """
    out.mkdir(parents=True, exist_ok=True)
    flags = os.environ.get("XLA_FLAGS", "") + " --xla_cpu_multi_thread_eigen=false"
    environment = os.environ | {"XLA_FLAGS": flags, "OMP_NUM_THREADS": "1"}
    started = []
    for job in range(jobs):
        log = out / f"job-{job}.log"
        command = [sys.executable, "-m", "experiments.inception", *argv]
        command += ["--job-of-several", str(job)]
        with log.open("w") as file:
            started.append(subprocess.Popen(command, env=environment, stdout=file, stderr=file))
        print(f"job {job} writes to {log}")
    try:
        while any(p.poll() is None for p in started) and not any(p.poll() for p in started):
            time.sleep(1)
        failed = [job for job, process in enumerate(started) if process.poll()]
    finally:  # after a failure or an interrupt; the next start continues from the checkpoints
        for process in started:
            process.terminate()
            process.wait()
    if failed:
        sys.exit(f"error: job {failed[0]} failed; {out / f'job-{failed[0]}.log'} says why.")
