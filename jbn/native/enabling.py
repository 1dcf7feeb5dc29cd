"""Functions that make jbn use the kernel or not: by a call, or by JBN_NATIVE in the environment."""

import os
import warnings

import jax

from jbn._sums.choose import register, unregister
from jbn._sums.kernel import KernelSums
from jbn.native import primitives
from jbn.native.compile import build as build_library
from jbn.native.compile import library, load

_targets: dict[str, str] = {}  # of the library, which is loaded once


def enable(build: bool = False) -> None:
    """Makes jbn use the kernel on CPU, in programs that are traced from now on.

    JAX's caches are cleared, so that earlier functions are traced again.

    Args:
      build: compile the kernel first if that has not been done.

    Raises:
      FileNotFoundError: the kernel has not been built.
      RuntimeError: the kernel cannot be built (see `build`), or cannot be loaded.
    """
    path = library()
    if not path.exists():
        if not build:
            raise FileNotFoundError(
                f"jbn's C++ kernel is not built: expected {path}. Run `python -m jbn.native`, or "
                "call jbn.native.enable(build=True)."
            )
        build_library()
    if not _targets:
        _targets.update(load(path))
    if not is_enabled():
        primitives.use(_targets)
        register(KernelSums(primitives))
        jax.clear_caches()


def disable() -> None:
    """Undoes `enable`."""
    if is_enabled():
        primitives.use({})
        unregister(KernelSums(primitives))
        jax.clear_caches()


def is_enabled() -> bool:
    """Returns whether `enable` was called last, and not `disable`."""
    return primitives.in_use()


def from_environment() -> None:
    """Calls `enable()` if JBN_NATIVE is set and is not 0; warns if that fails."""
    if os.environ.get("JBN_NATIVE", "0") in ("", "0"):
        return
    try:
        enable()
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"JBN_NATIVE is set, but without effect. {error}", RuntimeWarning, stacklevel=2
        )
