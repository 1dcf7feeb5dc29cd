"""The sums of Batch Normalization on CPU, by a C++ kernel that is compiled on request."""

from jbn.native.primitives import (
    build,
    disable,
    enable,
    from_environment,
    is_enabled,
    library,
    main,
    pair,
    spread,
    sums,
    usable,
)

__all__ = [
    "build",
    "library",
    "enable",
    "disable",
    "is_enabled",
    "from_environment",
    "usable",
    "sums",
    "pair",
    "spread",
    "main",
]
