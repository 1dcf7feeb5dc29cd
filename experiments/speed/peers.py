"""Batch Normalization of jbn and of its peers behind one signature.

A `Peer` makes a `Program` of a `Case`, which holds the input and the pass: forward, forward and
backward, or inference. `nets.layers` defines the task of all, and has the peers over JAX. PyTorch's
running variance is the unbiased one.

To add a library, or a form of jbn, add a line to `PEERS`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import jbn
from experiments.nets.layers import (
    BASELINE,
    DECAY,
    EPSILON,
    Case,
    Data,
    Layer,
    arguments,
    broadcast,
    data,
    epilogue,
    function_of,
    of_equinox,
    of_haiku,
    of_jbn,
    of_linen,
    of_nnx,
)


class Program(NamedTuple):
    """A competitor of a benchmark."""

    run: Callable[[], Any]  # computes the results, waits for them and returns them
    compiled: Any = None  # jax.stages.Compiled, where there is one


class Peer(NamedTuple):
    """A library's Batch Normalization."""

    program: Callable[[Case], Program]
    install: str  # the command that installs it; empty if it needs another machine
    available: Callable[[], bool]
    layer: Callable[[Case, Data], Layer] | None = None  # None: the library is not over JAX
    setting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def jax_program(make: Callable[[Case, Data], Layer], case: Case) -> Program:
    """Compiles one function of all arrays, on JAX's default device."""
    host = data(case)
    layer = make(case, host)
    args = arguments(layer, case, host)
    compiled = jax.jit(function_of(layer, case.which)).lower(*args).compile()
    return Program(lambda: jax.block_until_ready(compiled(*args)), compiled)


# --- PyTorch -------------------------------------------------------------------------------------


def torch_device() -> str | None:
    """Returns PyTorch's name of JAX's default device; None if PyTorch cannot use it."""
    if not importable("torch")():
        return None
    import torch  # pyright: ignore[reportMissingImports]  (optional)

    wanted = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    return None if wanted == "cuda" and not torch.cuda.is_available() else wanted


def torch_program(case: Case, cudnn: bool = True) -> Program:
    """Makes eager PyTorch's program, channels_last; on a GPU if JAX has one, with cuDNN or not."""
    import torch  # pyright: ignore[reportMissingImports]  (optional)

    device = torch_device()
    on_gpu = device == "cuda"
    host = data(case)

    def tensor(values: np.ndarray, **kwargs: Any) -> Any:
        t = torch.from_numpy(values).to(device=device, **kwargs)
        return t.moveaxis(-1, 1)  # the strides are those of channels_last

    dtype = getattr(torch, case.dtype)
    x, residual, dy = (tensor(a, dtype=dtype) for a in (host.x, host.residual, host.dy))
    channels = case.shape[-1]
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    scale, bias = (torch.from_numpy(a).to(device) for a in (host.scale, host.bias))
    backward = case.which == "forward+backward"
    leaves = [x, scale, bias] + ([residual] if case.form == "bn_add_relu" else [])
    for leaf in leaves:
        leaf.requires_grad_(backward)
    batch_norm = functools.partial(torch.nn.functional.batch_norm, eps=EPSILON, momentum=1 - DECAY)

    def results() -> Any:
        torch.backends.cudnn.enabled = cudnn  # at no cost; programs take turns
        with torch.set_grad_enabled(backward):
            y = batch_norm(x, mean, var, scale, bias, training=case.which != "inference")
            if case.form == "bn_add_relu":
                y = y + residual
            y = y if case.form == "bn" else torch.relu(y)
            out = (y, mean, var, torch.autograd.grad(y, leaves, dy) if backward else ())
        if on_gpu:
            torch.cuda.synchronize()
        return out

    return Program(results)


def copy_program(case: Case) -> Program:
    """Makes the floor: -x, which reads and writes every element once, and XLA cannot skip.

    On a GPU a plain copy would do. On a CPU XLA copies with one thread, and computes -x with all
    threads. In bfloat16 it converts to float32 and back, and is not quite a floor on a CPU.
    """
    x = jnp.asarray(data(case).x, case.dtype)
    compiled = jax.jit(jnp.negative).lower(x).compile()
    return Program(lambda: jax.block_until_ready(compiled(x)), compiled)


def folded_program(case: Case) -> Program:
    """Makes inference as y = a x + b; a, b come from scale, bias and statistics beforehand."""
    host = data(case)
    channels = case.shape[-1]
    stats = jbn.init_stats(channels)
    a = jnp.asarray(host.scale) / jnp.sqrt(stats.var + EPSILON)
    b = jnp.asarray(host.bias) - a * stats.mean
    residual = jnp.asarray(host.residual, case.dtype) if case.form == "bn_add_relu" else None

    def infer(x, a, b, residual):
        y = (x.astype(jnp.float32) * a + b).astype(x.dtype)
        return epilogue(case.form, y, residual)

    args = jnp.asarray(host.x, case.dtype), *broadcast(case, a, b), residual
    compiled = jax.jit(infer).lower(*args).compile()
    return Program(lambda: jax.block_until_ready(compiled(*args)), compiled)


# --- The table of competitors --------------------------------------------------------------------


def over_jax(
    layer: Callable[[Case, Data], Layer], package: str, module: str, native: bool = False
) -> Peer:
    """Makes a peer whose layers are functions of JAX arrays."""
    setting = functools.partial(sums, native=native) if module == "jbn" else contextlib.nullcontext

    def program(case: Case) -> Program:
        with setting():
            return jax_program(layer, case)

    if native:
        return Peer(program, "python -m jbn.native", native_is_built, layer, setting)
    return Peer(program, f"pip install {package}", importable(module), layer)


def importable(module: str) -> Callable[[], bool]:
    return lambda: importlib.util.find_spec(module) is not None


def native_is_built() -> bool:
    """Returns whether jbn's C++ sums are available: they are for CPUs."""
    if jax.default_backend() != "cpu" or not importable("jbn.native")():
        return False
    from jbn import native

    return native.library().exists()


@contextlib.contextmanager
def sums(native: bool) -> Iterator[None]:
    """Traces the block with jbn's C++ sums, or with XLA's. Compiled programs keep them."""
    from jbn import native as kernel

    before = kernel.is_enabled()
    (kernel.enable if native else kernel.disable)()
    try:
        yield
    finally:
        (kernel.enable if before else kernel.disable)()


PEERS = {
    BASELINE: over_jax(of_linen, "flax", "flax"),
    "flax.nnx": over_jax(of_nnx, "flax", "flax"),
    "jbn": over_jax(of_jbn, "jbn", "jbn"),
    "jbn native": over_jax(of_jbn, "jbn", "jbn", native=True),
    "haiku": over_jax(of_haiku, "dm-haiku", "haiku"),
    "equinox": over_jax(of_equinox, "equinox", "equinox"),
    "torch": Peer(torch_program, "pip install torch", lambda: torch_device() is not None),
    "torch without cuDNN": Peer(
        functools.partial(torch_program, cudnn=False),
        "",  # cuDNN is for GPUs
        lambda: torch_device() == "cuda",
    ),
}


def installed() -> dict[str, Peer]:
    """Returns the peers that can run here."""
    return {name: peer for name, peer in PEERS.items() if peer.available()}


def missing() -> dict[str, str]:
    """Maps the peers that cannot run here, but could, to the commands that install them."""
    return {n: peer.install for n, peer in PEERS.items() if peer.install and not peer.available()}
