"""Starting forward passes in the middle: what blocks gave in an earlier pass over the same batch is given again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from ..analysis.records import block_of
from ..phase import QuantLayer

__all__ = ['Prefix']


class Prefix:
    """The numbered blocks of ``model`` that hold no others, in the order in which they run, and what they gave.

    Args:
        model: after surgery.
    """

    def __init__(self, model: nn.Module) -> None:
        modules = dict(model.named_modules())
        self._layers = {name: m for name, m in modules.items() if isinstance(m, QuantLayer)}
        named = {block_of(name) for name in self._layers}
        numbered = {name for name in named if name.rpartition('.')[2].isdigit()}
        self._blocks = {
            name: modules[name] for name in numbered if not any(other.startswith(f'{name}.') for other in numbered)
        }
        self._order: list[str] = []
        self.starts: dict[str, int] = {}  #: path of a Q layer -> how many blocks had run before it was first called

    def record(self, run: Callable[[], Any]) -> tuple[Any, dict[str, Any]]:
        """Call ``run``; its result, and what every block gave. The first time is for the float model."""
        order: list[str] = []
        outputs: dict[str, Any] = {}
        starts: dict[str, int] = {}

        def begin(name: str) -> Callable[..., None]:
            def note(*_: Any) -> None:
                starts.setdefault(name, len(order))

            return note

        def end(name: str) -> Callable[..., None]:
            def keep(_module: Any, _args: Any, output: Any) -> None:
                order.append(name)
                outputs[name] = _copied(output)

            return keep

        with ExitStack() as hooks:
            for name, layer in self._layers.items():
                hooks.enter_context(layer.register_forward_pre_hook(begin(name)))
            for name, block in self._blocks.items():
                hooks.enter_context(block.register_forward_hook(end(name)))
            result = run()
        if not self.starts:  # quantized, integer layers do not call the quantizers that they write for
            self.starts = starts
            # A block that runs twice cannot be known by its name: every pass starts from the image then.
            self._order = order if len(set(order)) == len(order) else []
        return result, outputs

    @contextmanager
    def skipping(self, outputs: Mapping[str, Any], count: int) -> Iterator[None]:
        """Let the first ``count`` blocks give ``outputs`` instead of computing."""
        skipped: list[Any] = [self._blocks[name] for name in self._order[:count]]
        before = [block.__dict__.get('forward') for block in skipped]
        try:
            for block, name in zip(skipped, self._order, strict=False):
                block.forward = _giving(outputs[name])
            yield
        finally:
            for block, forward in zip(skipped, before, strict=True):
                block.__dict__.pop('forward', None)
                if forward is not None:
                    block.forward = forward


def _giving(output: Any) -> Callable[..., Any]:
    # a copy: what follows may write over it
    return lambda *_args, **_kwargs: _copied(output)


def _copied(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.clone()
    if isinstance(output, (tuple, list)):
        return type(output)(_copied(item) for item in output)
    return output
