"""Lists the equations and operations of programs, before XLA optimises them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax.extend.core


def equations(jaxpr: jax.extend.core.Jaxpr) -> Iterator[jax.extend.core.JaxprEqn]:
    """Yields the equations of a jaxpr and of the jaxprs inside them."""
    yield from jaxpr.eqns
    for inner in jax.extend.core.subjaxprs(jaxpr):
        yield from equations(inner)


def operations(operation: Any) -> Iterator[str]:
    """Yields the names of the operations inside an operation of MLIR, such as a module."""
    for region in operation.regions:
        for block in region:
            for inner in block:
                yield inner.operation.name.removeprefix("stablehlo.")
                yield from operations(inner.operation)
