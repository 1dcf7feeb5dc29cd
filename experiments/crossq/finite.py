"""Watches whether the training of a network with tanh stays finite.

A tanh that saturates gives a unit with exactly one value in a batch. There the derivative of sbx's
sqrt(var_B) is infinite; a ReLU that is off passes nothing back and hides it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from experiments.crossq.layers import using
from experiments.crossq.training import Config, make_model

WARMUP = 500  # steps


def watch(config: Config, seed: int, layer: str, steps: int) -> dict[str, Any]:
    """Trains until the critics' loss is not finite; returns when that was, None if never."""
    found: list[int] = []

    def look(of: dict[str, Any], _: Any) -> bool:
        loss = of["self"].logger.name_to_value.get("train/critic_loss", 0.0)
        if not np.isfinite(loss):
            found.append(of["self"].num_timesteps)
        return not found  # end at the first one

    with using(layer):
        model = make_model(config, seed, WARMUP, "tanh")
        model.learn(steps, callback=look)
    return {"seed": seed, "layer": layer, "warmup": WARMUP, "steps": steps,
            "not_finite_at": found[0] if found else None}  # fmt: skip
