"""The sums of Batch Normalization on CPU, by a C++ kernel that is compiled on request.

XLA reads x once for each sum and does not distribute a sum over threads. `kernel.cc` computes both
sums in one read on all threads, several times faster. It needs a C++ compiler, once:

    python -m jbn.native            # compiles it into a cache directory, and prints the path
    python -m jbn.native --check    # checks that it is compiled, and that it loads

Then call `jbn.native.enable()`, or set JBN_NATIVE=1 in the environment. Without either, nothing is
compiled or loaded.

There are three maps, with z = x - shift in float32:

    sums(x, shift)            = (sum z, sum z^2)
    pair(x, shift, t)         = (sum t, sum z t)      linear in t
    spread(x, shift, u, v, w) = w + u + z v           linear in (u, v, w); the transpose of pair

pair and spread are primitives of JAX, each the transpose of the other, so derivatives of every
order consist of them. On CPU, in a program for one device, the kernel computes sums and pair.
Everywhere else, for other dtypes and under vmap, all three are their equations in jax.numpy.

With `gate=(A, B)`, pair reads t, and spread gives its result, only where z A + B > 0; all else is
0. That is the derivative of relu(z A + B), without an array for the mask.
"""

from jbn.native.command import main
from jbn.native.compile import build, library
from jbn.native.enabling import disable, enable, from_environment, is_enabled
from jbn.native.primitives import Gate, pair, spread, sums, usable

__all__ = [
    # The library
    "build",
    "library",
    # Whether it is in use
    "enable",
    "disable",
    "is_enabled",
    "from_environment",
    # The maps that it computes
    "usable",
    "sums",
    "pair",
    "Gate",
    "spread",
    # python -m jbn.native
    "main",
]
