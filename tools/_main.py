"""What the tools' main functions share."""

from __future__ import annotations

import sys
from collections.abc import Callable

__all__ = ['exit_code']


def exit_code(tool: str, run: Callable[[], object], interrupted: str = 'interrupted, nothing was written') -> int:
    """Run ``run``; a user's mistake becomes one line on stderr and 2, an interruption ``interrupted`` and 130."""
    try:
        run()
    except (ValueError, RuntimeError, OSError) as error:
        print(f'{tool}: {error}', file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f'{tool}: {interrupted}', file=sys.stderr)
        return 130
    return 0
