"""Writes the measurements of a run, in a folder that one program at a time writes to."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from experiments.common.records import Records
from experiments.inception.runs import Options, Run

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

log = logging.getLogger(__name__)


class Notebook:
    """The measurements of a run: JSON lines, and TensorBoard's events if they are asked for.

    If there are several processes, all measure the same numbers, and the first one writes them.
    """

    def __init__(self, path: Path, *, resume_from: int, tensorboard: bool, **header: Any):
        writes = jax.process_index() == 0
        self.records = Records(path, resume_from=resume_from, **header) if writes else None
        self.writer: Any = None
        if tensorboard and writes:
            from tensorboardX import SummaryWriter

            self.writer = SummaryWriter(str(path.parent / "tensorboard"), purge_step=resume_from)

    def write(self, kind: str, **fields: Any) -> None:
        """Writes a line, and for every number in it a point of a curve in TensorBoard."""
        if self.records is not None:
            self.records.write(kind, **fields)
        for name, value in fields.items():
            if self.writer is not None and name != "step" and isinstance(value, float):
                self.writer.add_scalar(f"{kind}/{name}", value, fields["step"])

    def __enter__(self) -> Notebook:
        return self

    def __exit__(self, *error: object) -> None:
        if self.records is not None:
            self.records.__exit__(*error)
        if self.writer is not None:
            self.writer.close()


def lines(path: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """Reads the measurements in a file, of one kind or all; none if there is no file."""
    if not path.is_file():
        return []
    text = path.read_text(encoding="utf-8")
    whole = text[: text.rfind("\n") + 1]  # without a line that a program was writing when it died
    rows = [json.loads(line) for line in whole.splitlines()]
    return [row for row in rows if kind in (None, row["kind"])]


def described(run: Run, options: Options) -> dict[str, Any]:
    """Returns everything that the results of a run depend on."""
    computed = {k: getattr(options, k) for k in ("statistics", "bfloat16", "auxiliary")}
    if options.statistics == "ghost":
        computed["ghost_batch"] = options.ghost_batch
    if options.statistics == "local":
        computed["devices"] = options.devices or jax.device_count()
    return {
        "run": run.name,
        "seed": run.seed,
        "rate": run.rate,
        "dataset": run.scale.name,
        "baseline_steps": run.scale.steps,
        "evaluations": run.scale.evaluations,
        "of_network": run.scale.numbers(),
        "recipe": run.recipe._asdict(),
        **computed,
    }


def check_same(path: Path, identity: dict[str, Any]) -> None:
    """Raises ValueError if the file belongs to another run."""
    headers = lines(path, "header")
    for name, value in identity.items():
        given = headers[-1].get(name) if headers else value
        if given != value:
            raise ValueError(
                f"{path.parent} holds a run with {name}={given}, and not {value}. Give the same "
                "options as then to go on with it, or another folder with --out."
            )


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Locks the folder of a run while it is written to.

    Raises ValueError, in all processes, if another program has locked it.
    """
    with contextlib.ExitStack() as stack:
        free = jax.process_index() != 0 or _hold(folder, stack)
        if jax.process_count() > 1:  # all take the first one's answer
            free = bool(multihost_utils.broadcast_one_to_all(np.asarray(free)))
        if not free:
            raise ValueError(
                f"{folder} is in use: another program trains this very run. Wait for it, or give "
                "another folder with --out."
            )
        yield


def _hold(folder: Path, stack: contextlib.ExitStack) -> bool:
    """Locks the folder until the stack closes or the program dies; returns whether it was free."""
    folder.mkdir(parents=True, exist_ok=True)
    file = stack.enter_context((folder / "lock").open("w"))
    try:
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # some shared file systems have no locks
        log.warning("%s cannot be locked: take care that no other program trains this run.", folder)
    return True
