"""Counts the library's functions that one call of `jbn.batch_norm` goes through, and Flax's.

    python -m tests.hops

The call has a mask and a named axis; it is traced under vmap, with JAX's caches cleared.
`sys.setprofile` counts the calls of functions that the library's own files define, without
comprehensions, and how many of them are on the stack when the values of x are first summed. The
command also prints the lines of `jbn/` and its largest functions, from `tests.functions`.
"""

import collections
import functools
import pathlib
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import flax.linen.normalization
import jax
import jax.extend.core
import jax.numpy as jnp

import jbn
import tests.conftest  # noqa: F401  eight devices, strict dtypes and ranks
from tests import executions, functions

INSTANCES, EXAMPLES, FEATURES = 4, 256, 128
AXIS = "batch"
JBN = str(pathlib.Path(jbn.__file__).parent)
FLAX = flax.linen.normalization.__file__


class Hops(NamedTuple):
    """The number of calls, functions and files that one call goes through, and its depth."""

    calls: int
    functions: int  # different ones
    files: int
    depth: int  # frames of the library's own, when x is first summed


def measure(run: Callable[[], Any], prefix: str, size: int) -> Hops:
    """Counts calls of functions in files whose name begins with `prefix`, while run() traces.

    `size` is the size of x in one instance: the first sum over so many values is that over x.
    """
    calls: collections.Counter[tuple[str, int, str]] = collections.Counter()
    depth, outer = 0, sys._getframe()
    bind = jax.extend.core.Primitive.bind.__code__

    def own(code: Any) -> bool:
        inline = code.co_name.startswith("<") and code.co_name != "<lambda>"  # a comprehension
        return code.co_filename.startswith(prefix) and not inline

    def profile(frame: Any, event: str, _: Any) -> None:
        nonlocal depth
        code = frame.f_code
        if event != "call":
            return
        if own(code):
            calls[code.co_filename, code.co_firstlineno, code.co_name] += 1
        elif code is bind and not depth:
            primitive, args = frame.f_locals["self"], frame.f_locals["args"]
            if primitive.name == "reduce_sum" and args[0].size == size:
                depth = sum(own(f.f_code) for f in stack(frame, outer))

    jax.clear_caches()
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(before)
    return Hops(calls.total(), len(calls), len({file for file, *_ in calls}), depth)


def stack(frame: Any, outer: Any) -> list[Any]:
    """Lists a frame, the frame that called it, and so on, up to the last one before `outer`."""
    frames = []
    while frame is not outer:
        frames.append(frame)
        frame = frame.f_back
    return frames


def jbn_call() -> Hops:
    """Measures `jbn.batch_norm`."""
    params, stats = jbn.init_params(FEATURES), jbn.init_stats(FEATURES)

    def layer(x, mask):
        return jbn.batch_norm(x, params, stats, mask=mask, axis_name=AXIS)

    return trace(layer, JBN)


def flax_call() -> Hops:
    """Measures Flax's linen layer in the file that defines it, without the code of modules."""
    layer = nn.BatchNorm(use_running_average=False, axis_name=AXIS)
    variables = jax.jit(layer.init)(jax.random.key(0), jnp.ones((2, FEATURES)))

    def apply(x, mask):
        return layer.apply(variables, x, mask=mask, mutable=["batch_stats"])

    return trace(apply, FLAX)


def trace(layer: Callable[..., Any], prefix: str) -> Hops:
    """Measures (x, mask) -> (y, new) under vmap."""
    x, mask = jnp.ones((INSTANCES, EXAMPLES, FEATURES)), jnp.ones((INSTANCES, EXAMPLES, 1), bool)
    run = functools.partial(jax.make_jaxpr(jax.vmap(layer, axis_name=AXIS)), x, mask)
    with jax.set_mesh(executions.mesh((1,), ("only",))):  # the library divides no batch there
        return measure(run, prefix, EXAMPLES * FEATURES)


def main() -> None:
    for name, hops in {"jbn.batch_norm": jbn_call(), "flax.linen.BatchNorm": flax_call()}.items():
        print(f"{name}: {', '.join(f'{n} {what}' for what, n in hops._asdict().items())}")
    found = functions.of_package()
    print(f"\njbn/: {functions.lines_of_package()} lines, {len(found)} functions")
    for limit, title in ((functions.LINES, "lines"), (functions.PARAMETERS, "parameters")):
        sizes = sorted(((getattr(f, title), f.name) for f in found if not f.public), reverse=True)
        large = [f"{name} {size}" for size, name in sizes if size > limit]
        print(f"not public, with more than {limit} {title}: {', '.join(large) or 'none'}")


if __name__ == "__main__":
    main()
