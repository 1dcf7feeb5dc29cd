"""Makes a sequence of batches with Grain, in worker processes or threads, from any batch on.

Batch k is a function of k alone, ``Source.__getitem__``. This file makes batches in time, counts
those that were taken, and ends its workers.
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
    """The source that Grain reads from: batch k, for every k."""

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, index: int) -> Batch:
        raise NotImplementedError


class Batches(grain.DatasetIterator):
    """Batches from a given one on; a Grain iterator whose state is the number of the next batch.

    Grain's own iterator over worker processes has a state for each worker. Another number of
    workers cannot restore it, and it cannot begin in the middle. Since batch k depends on nothing
    but k, this iterator starts a new one of Grain's at the batch it needs. It does not ask Grain
    for more than ``length`` batches: at its end Grain's iterator keeps the last batch of every
    worker in shared memory.
    """

    def __init__(
        self, make: Callable[[int], grain.DatasetIterator], length: int, start: int = 0
    ) -> None:
        super().__init__()
        self._make, self.length, self._next = make, length, start
        self._inner: list[grain.DatasetIterator] = []  # one, or none after `close`
        # Closes at the end of the program at the latest, while workers can still be stopped.
        weakref.finalize(self, _close_all, self._inner)
        self.set_state({"next": start})

    def __next__(self) -> Batch:
        if self._next >= self.length:
            self.close()
        if not self._inner:
            raise StopIteration
        batch = next(self._inner[0])
        self._next += 1
        # Workers send arrays in shared memory. A copy (1 % of the time) is an ordinary array: it
        # may outlive the workers, and JAX may use it without copying.
        return {name: np.array(values) for name, values in batch.items()}

    def get_state(self) -> dict[str, int]:
        return {"next": self._next}

    def set_state(self, state: dict[str, int]) -> None:
        self.close()
        self._next = int(state["next"])
        self._inner.append(self._make(self._next))

    def close(self) -> None:
        """Ends the workers. No batches follow, unless a state is set."""
        while self._inner:  # calls no function of this module: Python may have removed it at exit
            self._inner.pop().close()


def _close_all(iterators: list[grain.DatasetIterator]) -> None:
    while iterators:
        iterators.pop().close()


def iterate(source: Source, length: int, workers: int, threads: int, start: int = 0) -> Batches:
    """Makes batches ``start`` to ``length`` of ``source``, in worker processes or threads."""
    if workers < 0:
        raise ValueError(f"workers={workers}. Expected 0, for threads, or more.")
    if start < 0:
        raise ValueError(f"start={start}. Expected the number of a batch, 0 or more.")

    def make(first: int) -> grain.DatasetIterator:
        dataset = grain.MapDataset.source(source)[first:]
        if not workers:  # read ahead: one batch a thread, and one more
            options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=threads + 1)
            return iter(dataset.to_iter_dataset(options))
        # Grain 0.2.18 reads a flag of absl, which fails unless absl has parsed the command line of
        # the program: https://github.com/google/grain/issues/1355.
        if not flags.FLAGS.is_parsed():
            flags.FLAGS.mark_as_parsed()
        one = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
        processes = grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=2)
        return iter(dataset.to_iter_dataset(one).mp_prefetch(processes))

    return Batches(make, length, start)


@dataclasses.dataclass(frozen=True)
class Share:
    """The positions of the global sequence of images that belong to a process."""

    batch: int  # images of this process
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
        """Returns the positions of this process' images in a batch, ``[batch]``."""
        own = step * self.batch + np.arange(self.batch, dtype=np.int64)
        return own * self.process_count + self.process_index
