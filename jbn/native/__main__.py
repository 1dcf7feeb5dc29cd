"""Runs `jbn.native.main`."""

import sys

from jbn.native.command import main

sys.exit(main())
