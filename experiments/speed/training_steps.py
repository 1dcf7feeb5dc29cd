"""Measures part step: whole training steps, their time and their memory."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

from experiments.common import timing
from experiments.nets import resnet
from experiments.nets.layers import BASELINE
from experiments.nets.steps import SLOTS, Network, TrainingStep, small_resnet, tiny_resnet
from experiments.speed import peers
from experiments.speed.cases import Config, bar
from experiments.speed.peers import Program
from experiments.speed.report import Row
from experiments.speed.single_layer import analysis, times


def slots_of(config: Config) -> list[str]:
    """Lists the networks whose libraries are to be measured."""
    return [name for name, slot in SLOTS.items() if slot.peer in config.libraries]


def step(config: Config) -> Iterator[Row]:
    """Measures whole training steps."""
    if config.quick:
        yield from time_steps(Network("tiny ResNet", tiny_resnet, 32, config.batch), config)
        return
    on_cpu = jax.default_backend() == "cpu"
    for dtype in config.dtypes:
        if dtype == "float32" or not on_cpu:  # on CPUs convolutions in bfloat16 are emulated
            small = Network("small ResNet", small_resnet, 32, config.batch, dtype)
            yield from time_steps(small, config)
        resnet50 = Network("ResNet-50", resnet.ResNet50, 224, config.batch, dtype)
        yield from time_steps(resnet50, config, run=config.run or not on_cpu)


def time_steps(network: Network, config: Config, run: bool = True) -> Iterator[Row]:
    """Measures the memory that a step needs beside its arguments and, if it may run, its time."""
    programs = {}
    for (name,) in bar(slots_of(config), about=f"{network.name}: compiling"):
        with peers.PEERS[SLOTS[name].peer].setting():
            training = network.training(SLOTS[name])
            programs[name] = runner(training, training.lower().compile(), run)
    baseline = analysis(programs[BASELINE]) if BASELINE in programs else {}
    for name, program in programs.items():
        row = Row("step", *network.about(), "temporaries", name, **analysis(program))
        if row.temporaries and baseline.get("temporaries"):
            ratio = row.temporaries / baseline["temporaries"]
            row = row._replace(ratio=ratio, low=ratio, high=ratio)
        yield row
    if not run:
        return
    samples = timing.interleave({n: p.run for n, p in programs.items()}, config.rounds)
    for name in programs:
        yield Row("step", *network.about(), "step", name, **times(samples, name))


def runner(training: TrainingStep, compiled: Any, run: bool) -> Program:
    """Makes a program that trains on the same images at each call; allocates only if it runs."""
    if not run:
        return Program(lambda: None, compiled)
    state = jax.jit(training.init)(jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), training.images.shape, training.images.dtype)
    labels = jnp.arange(len(images), dtype=training.labels.dtype) % 10

    def call() -> Any:
        nonlocal state
        state, loss = compiled(state, images, labels)
        return jax.block_until_ready((state, loss))

    return Program(call, compiled)
