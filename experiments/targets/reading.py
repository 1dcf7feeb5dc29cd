"""Compiles a program for a device, and reads its costs."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from experiments.common import hlo
from experiments.targets.programs import Program


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
        """Returns the fields that the rows to be compared have in common."""
        return self.target, self.part, self.case, self.dtype, self.form


def measure(target: str, on: Any, program: Program) -> Row:
    """Compiles a program for a device, and reads its costs."""
    function, arguments, donated = program.function()
    mesh = Mesh(np.asarray([on]), ("data",))
    everywhere = NamedSharding(mesh, P())

    def there(a: Any) -> Any:
        return jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=everywhere)

    jitted = jax.jit(function, donate_argnums=donated)
    with jax.set_mesh(mesh):  # else jbn splits the batch for the devices of this machine
        lowered = jitted.lower(*jax.tree.map(there, arguments))
    # Autotuning would time kernels, and there is no GPU.
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
