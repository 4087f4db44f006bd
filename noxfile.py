"""The suite's fast part in every environment that docs/compatibility.md names.

Each environment is a Python and a file of pins; see below, and docs/compatibility.md for what passed.
The whole suite instead of the fast part:  nox -s "tests(newest)" -- -m ""
Projects of MMSegmentation and MMDetection, nothing skipped:  nox -s mm_projects
"""

from __future__ import annotations

import os
from pathlib import Path

import nox

#: Name: (Python, pins, what it is for). A file of constraints lets pip resolve the rest; the lock is complete.
ENVIRONMENTS = {
    'oldest': ('3.10', 'requirements/matrix/oldest.txt', 'every lower bound of pyproject.toml at once'),
    'py310': ('3.10', 'requirements/matrix/py310.txt', 'the newest that Python 3.10 gets'),
    'locked': ('3.11', 'requirements/lock-py311.txt', 'what `make` installs'),
    'py312': ('3.12', 'requirements/matrix/py312.txt', 'the middle: before torch 2.6 turned weights_only on'),
    'newest': ('3.12', 'requirements/matrix/newest.txt', 'the newest of everything'),
    'py313': ('3.13', 'requirements/matrix/py313.txt', 'the newest of everything, on Python 3.13'),
}
__doc__ = f'{__doc__}\n' + ''.join(  # what `nox -l` prints above the sessions
    f'  tests({name}): Python {python}, {pins}: {purpose}\n' for name, (python, pins, purpose) in ENVIRONMENTS.items()
)

nox.options.default_venv_backend = 'venv'
nox.options.error_on_missing_interpreters = True
nox.options.reuse_existing_virtualenvs = True


@nox.session
@nox.parametrize('python,pins', [entry[:2] for entry in ENVIRONMENTS.values()], ids=list(ENVIRONMENTS))
def tests(session: nox.Session, pins: str) -> None:
    """The fast part of the suite; what follows `--` goes to pytest."""
    if Path(pins).name.startswith('lock-'):
        start = [line for line in Path(pins).read_text().splitlines() if line.startswith(('setuptools==', 'wheel=='))]
        session.install(*start)
        session.install(*_FLAGS, '--no-deps', '-r', pins)
        session.install(*_FLAGS, '--no-deps', '-e', '.')
    else:
        _resolve(session, pins)
    _pytest(session, '-m', 'not slow', *session.posargs)


@nox.session(python='3.11')
def mm_projects(session: nox.Session) -> None:
    """tests/test_mm_projects.py with MMSegmentation and MMDetection installed: what they would skip fails."""
    _resolve(session, 'requirements/matrix/mm_projects.txt', '-r', 'requirements/mm-py311.txt')
    _pytest(session, 'tests/test_mm_projects.py', *session.posargs, FQVIT_MM_PROJECTS='required')


def _resolve(session: nox.Session, pins: str, *more: str) -> None:
    """The package, its tools and ``more``, in the versions of ``pins``; pip chooses the others."""
    # sdists are built with this setuptools, not with the newest one, which has no pkg_resources
    session.install('-c', pins, 'setuptools', 'wheel')
    session.install(*_FLAGS, '-c', pins, '-e', '.[dev]', *more)


def _pytest(session: nox.Session, *args: str, **env: str) -> None:
    # idle threads that spin take the cores from whoever has work
    threads = {name: os.environ.get(name, value) for name, value in _THREADS.items()}
    session.run('python', '-m', 'pytest', *args, env={**threads, **env})


_FLAGS = ('--progress-bar', 'off', '--no-build-isolation')
_THREADS = {'OMP_NUM_THREADS': '2', 'OMP_WAIT_POLICY': 'PASSIVE', 'MPLBACKEND': 'Agg'}
