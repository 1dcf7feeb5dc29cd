"""A sequence of batches, made by Grain in worker processes or threads, from any of them on.

Batch k is a function of k alone, ``Source.__getitem__``. All that is left is to make batches in
time, to know how many were taken, and to leave nothing behind.
"""

from __future__ import annotations

import dataclasses
import sys
import weakref
from collections.abc import Callable

import grain
import numpy as np
from absl import flags

Batch = dict[str, np.ndarray]

ENDLESS = sys.maxsize


class Source:
    """What Grain reads from: batch k, for every k."""

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        raise NotImplementedError


class Batches(grain.DatasetIterator):
    """Batches from a given one on; a Grain iterator whose state is the number of the next.

    Grain's own iterator over worker processes has a state for each of them, which another number of
    workers cannot take up, and cannot begin in the middle. Since batch k depends on nothing but k,
    this one sets out anew from there. Nor does it ask Grain for more than ``length`` batches, since
    the end of Grain's keeps the last batch of every worker in memory that is shared.
    """

    def __init__(
        self, make: Callable[[int], grain.DatasetIterator], length: int, start: int = 0
    ) -> None:
        super().__init__()
        self._make, self.length, self._next = make, length, start
        self._inner: list[grain.DatasetIterator] = []  # one, or none once closed
        # At the latest when the program ends, as long as workers can still be told so.
        weakref.finalize(self, _close_all, self._inner)
        self.set_state({"next": start})

    def __next__(self) -> Batch:
        if self._next >= self.length:
            self.close()
        if not self._inner:
            raise StopIteration
        batch = next(self._inner[0])
        self._next += 1
        # Workers send memory that they share. A copy (1 % of the time) is an array like any other:
        # it may outlive the workers, and JAX may use it without copying.
        return {name: np.array(values) for name, values in batch.items()}

    def get_state(self) -> dict[str, int]:
        return {"next": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._next = int(state["next"])
        self._inner.append(self._make(self._next))

    def close(self) -> None:
        """Ends the workers. There are no more batches, unless a state is set."""
        while self._inner:  # no function of this module: it may be gone when Python ends
            self._inner.pop().close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def iterate(source: Source, length: int, workers: int, threads: int, start: int = 0) -> Batches:
    """Batches ``start`` to ``length`` of ``source``, made by worker processes or by threads."""
    if workers < 0:
        raise ValueError(f"workers={workers}. Expected 0, for threads, or more.")
    if start < 0:
        raise ValueError(f"start={start}. Expected the number of a batch, 0 or more.")

    def make(first: int) -> grain.DatasetIterator:
        dataset = grain.MapDataset.source(source)[first:]
        if not workers:  # ready: one batch a thread, and one to take
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
            return iter(dataset.to_iter_dataset(options))
        # Grain 0.2.18 asks for a flag of absl's, which fails unless the program has parsed its
        # command line with absl: https://github.com/google/grain/issues/1355.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return iter(dataset.to_iter_dataset(one).mp_prefetch(processes))

    return Batches(make, length, start)


@dataclasses.dataclass(frozen=True)
class Share:
    """Which positions of the global sequence of images belong to a process."""

    batch: int  # of this process
    process_index: int
    process_count: int

    def __post_init__(self):
        if self.batch < 1:
            raise ValueError(f"batch={self.batch}. Expected 1 or more images a process.")
        if not 0 <= self.process_index < self.process_count:
            raise ValueError(
                f"process_index={self.process_index}, process_count={self.process_count}. "
                "Expected an index from 0 to process_count - 1."
            )

    def positions(self, step: int) -> np.ndarray:
        """Of this process' images in a batch, ``[batch]``."""
        own = step * self.batch + np.arange(self.batch, dtype=np.int64)
        return own * self.process_count + self.process_index
