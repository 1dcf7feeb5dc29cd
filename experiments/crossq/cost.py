"""Times the updates of both layers in interleaved rounds."""

from __future__ import annotations

import functools
from typing import Any

from experiments.common import timing
from experiments.crossq.layers import LAYERS, using
from experiments.crossq.training import Config, make_model

WIDTHS = (128, 1024)  # of the learning curves, and of sbx's critics
UPDATES = 6  # a call, and two of the actor


def ready(config: Config, layer: str) -> Any:
    """Returns a model with a filled buffer, whose updates are compiled."""
    with using(layer):
        model = make_model(config, 0, warmup=500)
        model.learn(100)  # steps without an update
        model.train(gradient_steps=UPDATES, batch_size=config.batch)
    return model


def measure(config: Config, rounds: int) -> dict[str, Any]:
    """Returns the milliseconds of an update, and the quartiles of jbn's time over sbx's."""
    calls = {
        layer: functools.partial(
            ready(config, layer).train, gradient_steps=UPDATES, batch_size=config.batch
        )
        for layer in LAYERS
    }
    samples = timing.interleave(calls, rounds)
    ratio = samples.ratio("jbn", "sbx")
    each = {layer: 1e3 * samples.median(layer) / UPDATES for layer in LAYERS}
    return {"width": config.width, "rounds": rounds, **each, **ratio._asdict()}
