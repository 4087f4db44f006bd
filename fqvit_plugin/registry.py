"""Registries: where a config's ``type=...`` strings find our layers, hooks, observers and quantizers.

``LAYERS`` and ``HOOKS`` are children of MMEngine's own registries and carry this package's name as their
scope, so ``type='fqvit_plugin.QuantHook'`` resolves with no import at all: MMEngine imports
``fqvit_plugin.registry`` when it meets the scope. The same classes are also put into MMPretrain's registries,
where they are found without a scope once ``fqvit_plugin`` was imported (``custom_imports``).

``OBSERVERS``, ``QUANTIZERS`` and ``STEPS`` are what a user extends::

    @OBSERVERS.register_module()
    class MyObserver(Observer): ...

    get_scheme('fqvit_w8a8', observer='MyObserver')
"""

from __future__ import annotations

from mmengine.registry import HOOKS as MMENGINE_HOOKS
from mmengine.registry import MODELS as MMENGINE_MODELS
from mmengine.registry import Registry

__all__ = ['HOOKS', 'LAYERS', 'OBSERVERS', 'QUANTIZERS', 'STEPS', 'lookup']

_SCOPE = 'fqvit_plugin'

HOOKS = Registry('hook', parent=MMENGINE_HOOKS, scope=_SCOPE, locations=['fqvit_plugin.hooks'])
_MODULES = ['fqvit_plugin.layers', 'fqvit_plugin.integer.classifier']
LAYERS = Registry('model', parent=MMENGINE_MODELS, scope=_SCOPE, locations=_MODULES)
OBSERVERS = Registry('observer', scope=_SCOPE, locations=['fqvit_plugin.observers', 'fqvit_plugin.searching'])
_QUANTIZERS = [f'fqvit_plugin.{name}' for name in ('quantizers', 'codebook', 'escape')]
QUANTIZERS = Registry('quantizer', scope=_SCOPE, locations=_QUANTIZERS)
_STEPS = [f'fqvit_plugin.steps.{name}' for name in ('equalize', 'rounding', 'tuning')]
STEPS = Registry('step', scope=_SCOPE, locations=_STEPS)


def lookup(registry: Registry, name: str) -> type:
    """The class that ``registry`` knows as ``name``.

    Raises:
        ValueError: nothing of that name; the message lists the names there are.
    """
    registry.import_from_location()
    found = registry.module_dict.get(name)
    if found is None:
        known = ', '.join(sorted(registry.module_dict))
        raise ValueError(f'unknown {registry.name} {name!r}; there is: {known}')
    return found
