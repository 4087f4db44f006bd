"""A family of float models and how surgery treats it: what every module with twins exports as ``FAMILY``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .common import LayerFactory

__all__ = ['Family', 'class_path', 'short_name']


def class_path(cls: type) -> str:
    """``package.module.Class``; a family may name classes of packages that are not installed."""
    return f'{cls.__module__}.{cls.__qualname__}'


def short_name(path: str) -> str:
    """``Class`` of MMPretrain, ``timm.Class`` of another package: what people see."""
    package, name = path.partition('.')[0], path.rpartition('.')[2]
    return name if package == 'mmpretrain' else f'{package}.{name}'


@dataclass(frozen=True)
class Family:
    """Float models that the same twins replace.

    Args:
        models: :func:`class_path` of each. Matched exactly: a subclass may compute something else.
        check: raises ValueError naming the part that is not covered; changes nothing.
        quantize_: puts the twins into a model that passed ``check``.
        covers: a line for the table in docs/models.md: which models and options.
        refuses: a line for the same table: the options that ``check`` refuses.
    """

    models: tuple[str, ...]
    check: Callable[[Any], None]
    quantize_: Callable[[Any, LayerFactory], None]
    covers: str = ''
    refuses: str = ''
