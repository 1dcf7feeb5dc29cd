"""Measures part dispatch: the costs of a layer besides moving memory."""

from __future__ import annotations

import functools
import gc
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax

from experiments.common import timing
from experiments.nets import layers, resnet
from experiments.nets.layers import PASSES, Case
from experiments.nets.steps import SLOTS, Network, tiny_resnet
from experiments.speed import peers
from experiments.speed.cases import TINY_SHAPES, Config, bar
from experiments.speed.report import Row
from experiments.speed.single_layer import programs_of, time_programs, times
from experiments.speed.training_steps import slots_of


def dispatch(config: Config) -> Iterator[Row]:
    """Measures a layer's costs besides moving memory: calls of tiny layers, tracing, compiling."""
    shapes = TINY_SHAPES[:1] if config.quick else TINY_SHAPES
    for shape, which in bar(shapes, PASSES, about="dispatch: calls"):
        case = Case(shape, which=which)
        for row in time_programs("dispatch", case, programs_of(config, case), config):
            yield row._replace(quantity=f"{which}, a call", bandwidth=None, temporaries=None)
    over_jax = [name for name in config.libraries if peers.PEERS[name].layer]
    for shape in shapes:
        case = Case(shape, form="bn_relu")
        stages = {name: functools.partial(layer_stages, name, case) for name in over_jax}
        about = "x".join(map(str, shape)), "float32", "bn_relu"
        rounds = max(config.rounds // 3, 2)
        yield from time_stages(about, stages, rounds, rounds)
    yield from net_dispatch(config)


def net_dispatch(config: Config) -> Iterator[Row]:
    """Measures tracing and compiling of the training step of a whole network."""
    network = Network("ResNet-50", resnet.ResNet50, 224, config.batch)
    if config.quick:
        network = Network("tiny ResNet", tiny_resnet, 32, config.batch)
    stages = {name: functools.partial(net_stages, name, network) for name in slots_of(config)}
    rounds = (2, 0) if config.quick else (9, 3)  # compiling ResNet-50 takes 20 seconds
    yield from time_stages(network.about(), stages, *rounds)


class Stages(NamedTuple):
    """The seconds of tracing and compiling, before the first call."""

    trace: float  # Python runs, and the result is written as StableHLO
    compile: float | None


def layer_stages(name: str, case: Case, compile: bool) -> Stages:
    peer = peers.PEERS[name]
    assert peer.layer is not None
    with peer.setting():
        host = layers.data(case)
        layer = peer.layer(case, host)
        args = layers.arguments(layer, case, host)
        f = jax.jit(layers.function_of(layer, case.which))
        return time_both(lambda: f.trace(*args).lower(), compile)


def net_stages(name: str, network: Network, compile: bool) -> Stages:
    slot = SLOTS[name]
    with peers.PEERS[slot.peer].setting():
        return time_both(network.training(slot).lower, compile)


def time_both(lower: Callable[[], Any], compile: bool) -> Stages:
    """Times tracing and compiling from empty caches of JAX, after garbage collection."""
    jax.clear_caches()
    gc.collect()
    began = time.perf_counter()
    lowered = lower()
    traced = time.perf_counter()
    if not compile:
        return Stages(traced - began, None)
    lowered.compile()
    return Stages(traced - began, time.perf_counter() - traced)


def time_stages(
    about: tuple[str, str, str],
    stages: Mapping[str, Callable[[bool], Stages]],
    rounds: int,
    compiled: int,
) -> Iterator[Row]:
    """Yields rows of all `STAGES`: `rounds` of tracing, the last `compiled` of which compile.

    One more round comes first, in which Python warms up.
    """
    found: dict[str, list[Stages]] = {name: [] for name in stages}
    for (number,) in bar(range(rounds + 1), about=f"dispatch: {about[0]}"):
        for name in timing.shuffled(stages, number):
            found[name].append(stages[name](number > rounds - compiled))
    for quantity, seconds_of in STAGES.items():
        measured = {name: map(seconds_of, values[1:]) for name, values in found.items()}
        seconds = {name: [s for s in values if s is not None] for name, values in measured.items()}
        samples = timing.Samples(seconds)
        for name in stages if all(seconds.values()) else ():
            yield Row("dispatch", *about, quantity, name, **times(samples, name))


STAGES: dict[str, Callable[[Stages], float | None]] = {
    "trace+lower": lambda s: s.trace,
    "compile": lambda s: s.compile,
    "trace+lower+compile": lambda s: None if s.compile is None else s.trace + s.compile,
}
