"""What a model is made of, noted before surgery, so that it can be put back: the same modules and parameters."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ['Structure', 'all_or_nothing', 'note_scheme', 'scheme_of']


class Structure:
    """Every module of ``model`` with all its attributes; tensors and modules are noted, not copied."""

    def __init__(self, model: nn.Module) -> None:
        # the class too: surgery gives a ViT backbone another one
        self._modules = [(module, type(module), _shallow(module.__dict__)) for module in model.modules()]

    def restore_(self) -> None:
        """Give every module its attributes of that time back, parameters and submodules among them."""
        for module, kind, attributes in self._modules:
            module.__class__ = kind
            module.__dict__.clear()
            module.__dict__.update(_shallow(attributes))


def _shallow(attributes: dict[str, Any]) -> dict[str, Any]:
    """A copy whose own dicts, lists and sets (of submodules, parameters, hooks) are copies too."""
    return {k: copy.copy(v) if isinstance(v, (dict, list, set)) else v for k, v in attributes.items()}


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Leave the structure of ``model`` as it was when the block raises."""
    before = Structure(model)
    try:
        yield
    except BaseException:
        before.restore_()
        raise


def note_scheme(model: nn.Module, scheme: Any) -> None:
    """Let ``model`` know the recipe it was quantized by."""
    model.__dict__['quant_scheme'] = scheme


def scheme_of(model: nn.Module) -> Any:
    """The recipe of ``model`` or of the part of it that was quantized; None where none was noted."""
    return next((m.__dict__['quant_scheme'] for m in model.modules() if 'quant_scheme' in m.__dict__), None)
