"""The command `python -m jbn.native`, which compiles the kernel or checks that it is there."""

import argparse
import sys
from collections.abc import Sequence

from jbn.native.compile import build, library
from jbn.native.enabling import enable


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command `python -m jbn.native` and returns its exit status.

    Args:
      arguments: of the command line; None for those of this process.
    """
    parser = argparse.ArgumentParser(prog="python -m jbn.native", description="jbn's C++ kernel.")
    parser.add_argument("--check", action="store_true", help="compile nothing; does it load?")
    check = parser.parse_args(arguments).check
    try:
        if check:
            enable()
            print(f"{library()} is built, and loads.")
        else:
            print(build())
    except (OSError, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0
