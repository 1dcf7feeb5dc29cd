"""Batch Normalization of jbn and of its peers behind one signature.

A `Peer` makes a `Program` of a `Case`: what to normalise, and whether forward, forward and
backward, or inference. All do the same task: float32 scale and bias, statistics taken in float32
from x in its own dtype, running statistics that move by 1/10, epsilon 1e-5, y in x's dtype. Each in
its own way: Flax takes E[x^2] - E[x]^2, PyTorch's running variance is the unbiased one, Haiku's
averages are corrected for their start.

Forward and backward are one program, for which the cotangent lies ready. A compiler may then read x
once for a sum of each; in a network, where other layers come between, it cannot.
What a program hands back is what training needs: y, the new running statistics and, with the
backward pass, the gradients of x, scale, bias and, where one is added, the residual, for a given
random cotangent.

A further library, or a further form of jbn, is one line in `PEERS`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from jax import Array

import jbn

DECAY = 0.9  # weight of the old running statistics: PyTorch's default
EPSILON = 1e-5

FORMS = ("bn", "bn_relu", "bn_add_relu")  # y = bn(x), relu(bn(x)), relu(bn(x) + residual)
PASSES = ("forward", "forward+backward")


class Case(NamedTuple):
    """What is computed, on which data."""

    shape: tuple[int, ...]  # [N, ..., C]
    dtype: str = "float32"
    form: str = "bn"
    which: str = "forward+backward"  # one of PASSES, or "inference", or "folded"
    seed: int = 0

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


class Data(NamedTuple):
    """The arrays of a case, on the host: every library computes with the same numbers."""

    x: np.ndarray  # [N, ..., C] float32, which each library rounds to the case's dtype
    residual: np.ndarray
    dy: np.ndarray  # the cotangent of y
    scale: np.ndarray  # [C] float32
    bias: np.ndarray


class Program(NamedTuple):
    """A competitor of a benchmark."""

    run: Callable[[], Any]  # computes the results and returns them when they are there
    compiled: Any = None  # jax.stages.Compiled, where there is one


class Peer(NamedTuple):
    """A library's Batch Normalization."""

    program: Callable[[Case], Program]
    install: str  # the command that makes it available; empty if it takes another machine
    available: Callable[[], bool]
    layer: Callable[[Case, Data], Layer] | None = None  # of a library over JAX
    setting: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


@functools.lru_cache(maxsize=1)  # the competitors of one case come one after the other
def data(case: Case) -> Data:
    """Random arrays: mean 1 and standard deviation 2 in every feature, scales around 1."""
    rng = np.random.default_rng(case.seed)

    def normal(*shape: int) -> np.ndarray:
        return rng.standard_normal(shape, np.float32)

    x, residual, dy = (normal(*case.shape) for _ in range(3))
    channels = case.shape[-1]
    return Data(2 * x + 1, residual, dy, 1 + 0.1 * normal(channels), 0.1 * normal(channels))


# --- Libraries over JAX --------------------------------------------------------------------------


class Layer(NamedTuple):
    """A layer as pure functions of its parameters and running statistics.

    `params` and `stats` are of the library's own kind. `train` is (params, stats, x, residual) ->
    (y, new stats), `infer` the same -> y. The residual is None in the forms without one.
    """

    params: Any
    stats: Any
    train: Callable[..., tuple[Array, Any]]
    infer: Callable[..., Array]
    channels_first: bool = False  # whether x is [N, C, ...]


def epilogue(form: str, y: Array, residual: Array | None) -> Array:
    """What follows on Batch Normalization in a ResNet, for libraries that leave it to the user."""
    if residual is not None:
        y = y + residual
    return y if form == "bn" else jax.nn.relu(y)


def jax_program(make: Callable[[Case, Data], Layer], case: Case) -> Program:
    """One compiled function of all arrays, on JAX's default device."""
    host = data(case)
    layer = make(case, host)
    args = arguments(layer, case, host)
    compiled = jax.jit(function_of(layer, case.which)).lower(*args).compile()
    return Program(lambda: jax.block_until_ready(compiled(*args)), compiled)


def arguments(layer: Layer, case: Case, host: Data) -> tuple[Any, ...]:
    """What `function_of` takes, on JAX's default device."""

    def array(values: np.ndarray) -> Array:
        values = np.moveaxis(values, -1, 1) if layer.channels_first else values
        return jnp.asarray(np.ascontiguousarray(values), case.dtype)

    residual = array(host.residual) if case.form == "bn_add_relu" else None
    return layer.params, layer.stats, array(host.x), residual, array(host.dy)


def function_of(layer: Layer, which: str) -> Callable[..., Any]:
    """(params, stats, x, residual, dy) -> what the program hands back."""

    def forward(params, stats, x, residual, dy):
        return layer.train(params, stats, x, residual)

    def both(params, stats, x, residual, dy):
        def train(params, x, residual):
            return layer.train(params, stats, x, residual)

        y, pull, stats = jax.vjp(train, params, x, residual, has_aux=True)
        return y, stats, pull(dy)

    def infer(params, stats, x, residual, dy):
        return layer.infer(params, stats, x, residual)

    return {"forward": forward, "forward+backward": both, "inference": infer}[which]


def of_jbn(case: Case, host: Data) -> Layer:
    options = {"epsilon": EPSILON, **fused(case.form)}

    def train(params, stats, x, residual):
        added = {} if residual is None else {"residual": residual}
        return jbn.batch_norm(x, params, stats, update=jbn.ema(DECAY), **options, **added)

    def infer(params, stats, x, residual):
        added = {} if residual is None else {"residual": residual}
        return jbn.batch_norm_inference(x, params, stats, **options, **added)

    params = jbn.Params(jnp.asarray(host.scale), jnp.asarray(host.bias))
    return Layer(params, jbn.init_stats(case.shape[-1]), train, infer)


def fused(form: str) -> dict[str, Any]:
    """jbn's arguments for what follows on Batch Normalization."""
    return {} if form == "bn" else {"activation": jax.nn.relu}


def of_linen(case: Case, host: Data) -> Layer:
    module = linen.BatchNorm(momentum=DECAY, epsilon=EPSILON, dtype=jnp.dtype(case.dtype))
    channels = case.shape[-1]
    stats = {"mean": jnp.zeros(channels), "var": jnp.ones(channels)}
    params = {"scale": jnp.asarray(host.scale), "bias": jnp.asarray(host.bias)}

    def train(params, stats, x, residual):
        variables = {"params": params, "batch_stats": stats}
        y, new = module.apply(variables, x, use_running_average=False, mutable=["batch_stats"])
        return epilogue(case.form, y, residual), new["batch_stats"]

    def infer(params, stats, x, residual):
        variables = {"params": params, "batch_stats": stats}
        y: Any = module.apply(variables, x, use_running_average=True)
        return epilogue(case.form, y, residual)

    return Layer(params, stats, train, infer)


def of_nnx(case: Case, host: Data) -> Layer:
    dtype = jnp.dtype(case.dtype)
    layer = nnx.BatchNorm(
        case.shape[-1], momentum=DECAY, epsilon=EPSILON, dtype=dtype, rngs=nnx.Rngs(0)
    )
    assert layer.scale is not None
    assert layer.bias is not None
    layer.scale[...], layer.bias[...] = jnp.asarray(host.scale), jnp.asarray(host.bias)
    graph, params, stats = nnx.split(layer, nnx.Param, nnx.BatchStat)

    def train(params, stats, x, residual):
        layer = nnx.merge(graph, params, stats, copy=True)
        y = layer(x, use_running_average=False)
        return epilogue(case.form, y, residual), nnx.state(layer, nnx.BatchStat)

    def infer(params, stats, x, residual):
        y = nnx.merge(graph, params, stats, copy=True)(x, use_running_average=True)
        return epilogue(case.form, y, residual)

    return Layer(params, stats, train, infer)


def of_haiku(case: Case, host: Data) -> Layer:
    """Haiku takes statistics in x's dtype: x is cast to float32 first, and y back."""
    import haiku as hk  # pyright: ignore[reportMissingImports]  (optional)

    def call(x, training):
        layer = hk.BatchNorm(True, True, DECAY, eps=EPSILON, name="bn")
        return layer(x.astype(jnp.float32), training).astype(x.dtype)

    net = hk.without_apply_rng(hk.transform_with_state(call))
    # Haiku's averages start with their first batch, which init takes: one of mean 0 and variance 1.
    (ones,) = broadcast(case, jnp.ones(case.shape[-1]))
    _, stats = net.init(jax.random.key(0), jnp.concatenate([-ones, ones]), True)
    scale, bias = broadcast(case, jnp.asarray(host.scale), jnp.asarray(host.bias))
    params = {"bn": {"scale": scale, "offset": bias}}

    def train(params, stats, x, residual):
        y, stats = net.apply(params, stats, x, True)
        return epilogue(case.form, y, residual), stats

    def infer(params, stats, x, residual):
        y, _ = net.apply(params, stats, x, False)
        return epilogue(case.form, y, residual)

    return Layer(params, stats, train, infer)


def of_equinox(case: Case, host: Data) -> Layer:
    """Equinox is for [N, C, ...], and gets that; it computes in x's dtype, so x is cast as well."""
    import equinox as eqx  # pyright: ignore[reportMissingImports]  (optional)

    layer, state = eqx.nn.make_with_state(eqx.nn.BatchNorm)(
        case.shape[-1], "batch", eps=EPSILON, momentum=DECAY, mode="batch"
    )
    layer = eqx.tree_at(
        lambda layer: (layer.weight, layer.bias),
        layer,
        (jnp.asarray(host.scale), jnp.asarray(host.bias)),
    )
    params, static = eqx.partition(layer, eqx.is_inexact_array)

    def apply(params, state, x, inference):
        layer = eqx.nn.inference_mode(eqx.combine(params, static), inference)
        over_batch = jax.vmap(layer, axis_name="batch", in_axes=(0, None), out_axes=(0, None))
        y, state = over_batch(x.astype(jnp.float32), state)
        return y.astype(x.dtype), state

    def train(params, state, x, residual):
        y, state = apply(params, state, x, False)
        return epilogue(case.form, y, residual), state

    def infer(params, state, x, residual):
        return epilogue(case.form, apply(params, state, x, True)[0], residual)

    return Layer(params, state, train, infer, channels_first=True)


# --- PyTorch -------------------------------------------------------------------------------------


def torch_device() -> str | None:
    """Where PyTorch computes what JAX computes on its default device; None if it cannot."""
    if not importable("torch")():
        return None
    import torch  # pyright: ignore[reportMissingImports]  (optional)

    wanted = {"cpu": "cpu", "gpu": "cuda"}.get(jax.default_backend())
    return None if wanted == "cuda" and not torch.cuda.is_available() else wanted


def torch_program(case: Case, cudnn: bool = True) -> Program:
    """PyTorch, eager; images as channels_last; on a GPU if JAX has one, with cuDNN or without."""
    import torch  # pyright: ignore[reportMissingImports]  (optional)

    device = torch_device()
    on_gpu = device == "cuda"
    host = data(case)

    def tensor(values: np.ndarray, **kwargs: Any) -> Any:
        t = torch.from_numpy(values).to(device=device, **kwargs)
        return t.moveaxis(-1, 1)  # strides say channels_last now

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
        torch.backends.cudnn.enabled = cudnn  # costs nothing; programs take turns
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
    """The floor: -x, which reads and writes every element once, and which XLA cannot leave out.

    A plain copy would do on a GPU; on a CPU XLA hands that to one thread, and -x to all. In
    bfloat16 it converts there and back, and is not quite a floor on a CPU.
    """
    x = jnp.asarray(data(case).x, case.dtype)
    compiled = jax.jit(jnp.negative).lower(x).compile()
    return Program(lambda: jax.block_until_ready(compiled(x)), compiled)


def folded_program(case: Case) -> Program:
    """Inference as y = a x + b, with a and b computed beforehand of scale, bias and statistics."""
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


def broadcast(case: Case, *vectors: Array) -> list[Array]:
    """Vectors [C] with the rank of x."""
    return [v.reshape((1,) * (len(case.shape) - 1) + (-1,)) for v in vectors]


# --- The table of competitors --------------------------------------------------------------------


def over_jax(
    layer: Callable[[Case, Data], Layer], package: str, module: str, native: bool = False
) -> Peer:
    """A peer whose layers are functions of JAX arrays."""
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
    """Whether jbn's C++ sums can be had: they are for CPUs."""
    if jax.default_backend() != "cpu" or not importable("jbn.native")():
        return False
    from jbn import native

    return native.library().exists()


@contextlib.contextmanager
def sums(native: bool) -> Iterator[None]:
    """What is traced in here uses jbn's C++ sums, or XLA's. Compiled programs keep them."""
    from jbn import native as kernel

    before = kernel.is_enabled()
    (kernel.enable if native else kernel.disable)()
    try:
        yield
    finally:
        (kernel.enable if before else kernel.disable)()


BASELINE = "flax.linen"
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
    """The peers that can run here."""
    return {name: peer for name, peer in PEERS.items() if peer.available()}


def missing() -> dict[str, str]:
    """Those that cannot, but could: name -> the command that would change it."""
    return {n: peer.install for n, peer in PEERS.items() if peer.install and not peer.available()}
