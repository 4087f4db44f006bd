"""The package's layering: imports only point up one list, and no file grows past a screenful of screenfuls.

Oracle: ``ORDER`` below, which is the layout the design promises, and the syntax tree of every file.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import fqvit_plugin

PACKAGE = Path(fqvit_plugin.__file__).parent
NAME = PACKAGE.name

#: A module may import those above it. A new module belongs as far up as its imports allow.
ORDER = [
    '_torch',
    'compiled',
    'registry',
    'functional',
    'scheme',
    'grids',
    'observers',
    'presets',
    'searching',
    'quantizers',
    'weight_quantizer',
    'codebook',
    'escape',
    'intmath',
    'dyadic',
    'fused',
    'tables',
    'phase',
    'exact',
    'layers.common',
    'layers.act',
    'layers.norm',
    'layers.softmax',
    'layers.weights',
    'layers',
    'structure',
    'overrides',
    'lifecycle',
    'blocks',
    'blocks.sums',
    'blocks.common',
    'blocks.family',
    'blocks.attention',
    'blocks.swiglu',
    'blocks.vit',
    'blocks.swin',
    'blocks.beit',
    'blocks.eva02',
    'blocks.swinv2',
    'blocks.twins',
    'blocks.mvit',
    'blocks.davit',
    'blocks.timm_common',
    'blocks.timm_vit',
    'blocks.timm_swin',
    'blocks.refused',
    'blocks.swin_dense',
    'report',
    'surgery',
    'steps',
    'steps.base',
    'steps.parts',
    'steps.statistics',
    'steps.equalize',
    'steps.rounding',
    'steps.tuning',
    'recipe',
    'checkpoint_io',
    '_convert_names',
    'convert',
    'distributed',
    'calibration',
    'checkpoint',
    'analysis',
    'analysis.records',
    'analysis.measure',
    'analysis.collect',
    'analysis.terminal',
    'analysis.svg',
    'analysis.style',
    'analysis.page',
    'analysis.visualize',
    'sensitivity',
    'sensitivity.records',
    'sensitivity.kinds',
    'sensitivity.switches',
    'sensitivity.prefix',
    'sensitivity.units',
    'sensitivity.measure',
    'sensitivity.channels',
    'sensitivity.terminal',
    'sensitivity.page',
    'sensitivity.run',
    'sensitivity.allocation',
    'integer',
    'integer.kernels',
    'integer.program',
    'integer.builder',
    'integer.common',
    'integer.vit',
    'integer.swin',
    'integer.convert',
    'integer.packing',
    'integer.checkpoint',
    'native',
    'native.build',
    'native.structs',
    'native.layout',
    'native.constants',
    'native.attention',
    'native.planner',
    'native.memory',
    'native.model',
    'integer.classifier',
    'export.packages',
    'export.graph',
    'export.targets',
    'export.layouts',
    'export.shapes',
    'export.functions',
    'export.escapes',
    'export.integer_form',
    'export.softmax',
    'export.linear',
    'export.qdq_form',
    'export.pairs',
    'export.carried_norm',
    'export.carried_form',
    'export.proof',
    'export.tensorrt',
    'export.convert',
    'export',
    'gpu.support',
    'gpu.kernels',
    'gpu.kernels.rules',
    'gpu.kernels.gemm',
    'gpu.kernels.image',
    'gpu.kernels.rows',
    'gpu.kernels.attention',
    'gpu.base',
    'gpu.packing',
    'gpu.steps',
    'gpu.planner',
    'gpu.model',
    'gpu',
    'apis',
    'hooks',
    'timm_data',
    'search',
    'search.nni_compat',
    'search.nni_config',
    'search.nni_quantizer',
    'search.space',
    'search.objective',
    'search.setup',
    'search.trial',
    'search.experiment',
    'search.results',
    '',  # the package itself
    'configs',  # for users' configs to inherit; nothing of the package may need it
    'configs.fqvit',
]
#: Siblings that must not know each other, although one stands above the other.
STRANGERS = [('blocks.swin', 'blocks.vit'), ('blocks.timm_swin', 'blocks.timm_vit'), ('checkpoint', 'calibration')]
FILES = sorted(path for path in PACKAGE.rglob('*.py') if '.mim' not in path.parts)


def module_of(path: Path) -> str:
    """``blocks.vit`` of ``blocks/vit.py``, ``blocks`` of ``blocks/__init__.py``."""
    parts = path.relative_to(PACKAGE).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and 'TYPE_CHECKING' in ast.unparse(node.test)


def imports_of(path: Path, tree: ast.AST | None = None) -> set[str]:
    """Modules of this package that ``path`` imports when it runs, wherever in the file."""
    found: set[str] = set()
    # the package that a leading dot means: blocks/vit.py and blocks/__init__.py both live in blocks
    home = [NAME, *path.relative_to(PACKAGE).parent.parts]
    for node in ast.iter_child_nodes(tree or ast.parse(path.read_text(encoding='utf-8'))):
        if is_type_checking(node):
            continue
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = home[: len(home) - node.level + 1] if node.level else []
            source = '.'.join([*base, *([node.module] if node.module else [])])
            # `from . import layers` names a module, `from .layers import QAct` a thing in one
            names = [f'{source}.{a.name}' if is_module(f'{source}.{a.name}') else source for a in node.names]
        found.update(n.removeprefix(NAME).lstrip('.') for n in names if n.split('.')[0] == NAME)
        found |= imports_of(path, node)
    return found


def is_module(name: str) -> bool:
    place = PACKAGE.parent.joinpath(*name.split('.'))
    return place.with_suffix('.py').is_file() or (place / '__init__.py').is_file()


def test_the_list_is_complete():
    modules = {module_of(path) for path in FILES}
    assert modules == set(ORDER), 'ORDER lists other modules than there are: put new ones where they belong'


@pytest.mark.parametrize('path', FILES, ids=lambda p: module_of(p) or '__init__')
def test_imports_point_up(path):
    module = module_of(path)
    above = set(ORDER[: ORDER.index(module)])
    down = sorted(imports_of(path) - above)
    assert not down, f'{module or NAME} imports {", ".join(down)}, which should not be below it in ORDER'


@pytest.mark.parametrize(('module', 'other'), STRANGERS)
def test_siblings_are_strangers(module, other):
    path = PACKAGE.joinpath(*module.split('.')).with_suffix('.py')
    assert not {name for name in imports_of(path) if name == other or name.startswith(f'{other}.')}


@pytest.mark.parametrize(
    'path', [*FILES, *sorted((PACKAGE / 'native' / 'src').iterdir())], ids=lambda p: f'{p.parent.name}/{p.name}'
)
def test_no_file_over_400_lines(path):
    assert len(path.read_text(encoding='utf-8').splitlines()) <= 400


@pytest.mark.parametrize(
    ('source', 'expected'),
    [
        ('from .layers import QAct', {'layers'}),
        ('from . import layers, phase', {'layers', 'phase'}),
        ('from fqvit_plugin.blocks.vit import check_vit', {'blocks.vit'}),
        ('import fqvit_plugin.hooks, torch', {'hooks'}),
        ('import fqvit_plugin', {''}),
        ('def f():\n    if True:\n        from .surgery import check_model', {'surgery'}),
        ('if TYPE_CHECKING:\n    from .hooks import QuantHook', set()),
        ('import torch\nfrom mmengine import Config', set()),
    ],
)
def test_this_files_own_reading(source, expected):
    assert imports_of(PACKAGE / 'layers.py', ast.parse(source)) == expected


def test_dots_are_counted_from_the_file():
    inside = PACKAGE / 'blocks' / 'vit.py'
    assert imports_of(inside, ast.parse('from ..layers import QAct\nfrom .common import link')) == {
        'layers',
        'blocks.common',
    }
