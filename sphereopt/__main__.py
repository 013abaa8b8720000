"""``python -m sphereopt``."""

import sys

from sphereopt.cli import main

sys.exit(main())
