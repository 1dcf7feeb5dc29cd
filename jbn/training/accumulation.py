"""Sums over all microbatches and devices, and new statistics: pooled once, or updated in turn."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from jbn._core.deferral import chosen, defer, is_waiting, settle, vary
from jbn._core.shift import accumulator
from jbn.training.checks import check_synchronised
from jbn.training.microbatches import Microbatches, Sums, summed, writable
from jbn.training.types import Tree


def pooled(parts: Microbatches, stats: Tree) -> tuple[Sums, Tree]:
    """Updates the statistics once, by the moments of the whole batch.

    Every part starts from the same statistics. State that is not deferred is taken from the last
    part.
    """
    names = parts.names
    given = vary(stats, names)
    only = chosen(lambda v: parts.loss_fn(parts.params, writable(v), *parts.arguments(0))[1], given)
    stats = defer(stats, only=only)
    several = parts.number > 1
    sums, stats = _collect(parts, stats) if several else parts.differentiate(0, stats)
    sums = summed(sums, names)
    return sums, settle(stats, stacked=several, axis_name=names or None, deferred=only)


def in_turn(parts: Microbatches, stats: Tree) -> tuple[Sums, Tree]:
    """Updates the statistics part by part, as the layers do by themselves.

    Raises:
      ValueError: the new statistics differ between the devices.
    """

    def part(i: Array | int, stats: Tree) -> tuple[Sums, Tree, tuple[()]]:
        sums, new_stats = parts.differentiate(i, stats)
        check_synchronised(new_stats, parts.names)
        return sums, new_stats, ()

    sums, stats, _ = _scan(part, parts, stats) if parts.number > 1 else part(0, stats)
    return summed(sums, parts.names), stats


def _collect(parts: Microbatches, stats: Tree) -> tuple[Sums, Tree]:
    """Stacks the deferred updates of all parts; takes all other state from the last part."""
    leaves, structure = jax.tree.flatten(stats, is_leaf=is_waiting)
    waiting = [is_waiting(leaf) for leaf in leaves]
    others = vary([jnp.asarray(v) for v in _split(leaves, waiting)[1]], parts.names)

    def part(i: Array, _: Tree) -> tuple[Sums, Tree, Tree]:
        sums, new_stats = parts.differentiate(i, stats)
        updates, rest = _split(jax.tree.leaves(new_stats, is_leaf=is_waiting), waiting)
        # Convert to the types of the scan's carry.
        rest = [jnp.asarray(new, old.dtype) for new, old in zip(rest, others, strict=True)]
        return sums, vary(rest, parts.names), updates

    sums, rest, updates = _scan(part, parts, others)
    return sums, jax.tree.unflatten(structure, _join(updates, rest, waiting))


def _scan(
    part: Callable[[Array, Tree], tuple[Sums, Tree, Tree]], parts: Microbatches, carry: Tree
) -> tuple[Sums, Tree, Tree]:
    """Adds up the sums of all parts; `part` is (i, carry) -> (sums, carry, arrays to stack)."""

    def body(state: tuple[Tree, Tree], i: Array) -> tuple[tuple[Tree, Tree], Tree]:
        grads, carry = state
        sums, carry, out = part(i, carry)
        grads = jax.tree.map(jnp.add, grads, sums.grads)
        return (grads, carry), (sums.loss, sums.metrics, out)

    def zeros(p: Array) -> Array:
        return jnp.zeros_like(p, accumulator(p.dtype))

    start = jax.tree.map(zeros, parts.params), carry
    (grads, carry), (loss, metrics, out) = lax.scan(body, start, jnp.arange(parts.number))
    loss, metrics = jax.tree.map(lambda values: jnp.sum(values, 0), (loss, metrics))
    return Sums(grads, loss, metrics), carry, out


def _split(leaves: list[Any], first: list[bool]) -> tuple[list[Any], list[Any]]:
    pairs = list(zip(leaves, first, strict=True))
    return [v for v, own in pairs if own], [v for v, own in pairs if not own]


def _join(ones: list[Any], others: list[Any], first: list[bool]) -> list[Any]:
    """Inverts `_split`."""
    ones_, others_ = iter(ones), iter(others)
    return [next(ones_ if own else others_) for own in first]
