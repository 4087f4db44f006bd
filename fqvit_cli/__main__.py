"""``python -m fqvit_cli``: the command without its entry point, from a checkout that is not installed."""

import sys

from . import main

sys.exit(main())
