"""The command `python -m jbn.native`."""

import sys

from jbn.native import main

sys.exit(main())
