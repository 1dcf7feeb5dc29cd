"""Chooses which images a step has, and in which order."""

from __future__ import annotations

import numpy as np

from experiments.batches.cases import ORDERS, STEP


def image_order(labels: np.ndarray, steps: int, order: str, seed: int) -> np.ndarray:
    """Returns the images of every step, ``[steps, STEP]``.

    ``"iid"``: every epoch is a new shuffle of all images. Otherwise a step has the same number of
    images of each of ``ORDERS[order]`` classes, one class after the other, so that a part which
    is no longer than that has images of one class. Each class comes as often as any other; its
    images come in a new shuffle every epoch of that class.
    """
    rng = np.random.default_rng(seed)
    n_classes_a_step = ORDERS[order]
    if n_classes_a_step is None:
        return shuffled(rng, np.arange(len(labels)), steps * STEP).reshape(steps, STEP)
    drawn = class_order(rng, labels.max() + 1, steps, n_classes_a_step)
    drawn = np.repeat(drawn, STEP // n_classes_a_step, axis=1)
    rows = np.empty(drawn.shape, np.int64)
    for label in range(labels.max() + 1):
        mine = drawn == label
        rows[mine] = shuffled(rng, np.flatnonzero(labels == label), int(mine.sum()))
    return rows


def shuffled(rng: np.random.Generator, items: np.ndarray, wanted: int) -> np.ndarray:
    """Returns as many items as wanted; every epoch has each item once, in a new order."""
    epochs = [rng.permutation(items) for _ in range(-(-wanted // len(items)))]
    return np.concatenate(epochs)[:wanted] if epochs else items[:0]


def class_order(rng: np.random.Generator, n_classes: int, steps: int, a_step: int) -> np.ndarray:
    """Returns the classes of every step, ``[steps, a_step]``, different ones within a step.

    Steps deal ``a_step`` copies of a shuffled deck of all classes, before it is shuffled again.
    """
    decks = [rng.permutation(n_classes) for _ in range(-(-steps // n_classes))]
    dealt = [np.resize(deck, (n_classes, a_step)) for deck in decks]
    return np.concatenate(dealt)[:steps]
