"""``python -m emulus`` is ``emulus``."""

import sys

from emulus.cli import main

sys.exit(main())
