"""The choice of an implementation of the sums: the first registered kernel that fits, or XLA."""

from jbn._devices.named_axes import Scope
from jbn._sums.kernel import KernelSums
from jbn._sums.protocol import Batch, Sums
from jbn._sums.xla import XlaSums

_registered: list[KernelSums] = []


def register(kernel: KernelSums) -> None:
    """Offers a kernel to every layer that is traced from now on."""
    if kernel not in _registered:
        _registered.append(kernel)


def unregister(kernel: KernelSums) -> None:
    """Undoes `register`."""
    if kernel in _registered:
        _registered.remove(kernel)


def choose(batch: Batch, over: Scope) -> Sums:
    """Chooses the implementation for these values and for the instances that share their sums."""
    return next((kernel for kernel in _registered if kernel.fits(batch, over)), XlaSums())
