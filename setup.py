"""Puts configs and tools into the wheel as ``fqvit_plugin/.mim``, where mim looks; the rest is in pyproject.toml."""

from __future__ import annotations

import shutil
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
#: What `mim` and the command `fqvit` find in an installed package.
SHIPPED = ('configs', 'tools')


def mim_files() -> list[Path]:
    """Files of the shipped folders, relative to the repository; nothing that Python or an editor left there."""
    paths = (path for folder in SHIPPED for path in sorted((ROOT / folder).rglob('*')))
    names = (path.relative_to(ROOT) for path in paths if path.is_file() and path.suffix in {'.py', '.yml', '.json'})
    return [name for name in names if '__pycache__' not in name.parts and not name.name.startswith('.')]


class BuildWithMim(build_py):
    """Copies at build time, so that the repository holds each file once."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:  # the checkout itself is used
            return
        target = self._mim()
        shutil.rmtree(target, ignore_errors=True)  # what an earlier build left in build/
        for name in mim_files():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, target / name)

    def get_outputs(self, include_bytecode: bool = True) -> list[str]:
        copied = [] if self.editable_mode else [str(self._mim() / name) for name in mim_files()]
        return [*super().get_outputs(include_bytecode), *copied]

    def _mim(self) -> Path:
        return Path(self.build_lib, 'fqvit_plugin', '.mim')


setup(cmdclass={'build_py': BuildWithMim})
