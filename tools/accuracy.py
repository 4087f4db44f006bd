"""Top-1 of ViT-Tiny and DeiT-Tiny on real photographs, float and by several recipes, on the same images."""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from _deployed import ENGINES, deploy, same_answers
from _documents import check_writable, write_json
from _twins import scale_difference
from mmpretrain.registry import DATASETS, MODELS
from rich.console import Console
from rich.table import Table
from torch import Tensor

import fqvit_plugin as fq
from fqvit_plugin.apis import load_config
from fqvit_plugin.convert import load_checkpoint_file
from fqvit_plugin.presets import parse_scheme

CONFIGS = Path(__file__).resolve().parents[1] / 'configs'
WEIGHTS = {'vit_t': 'vit_tiny_patch16_224.pth', 'deit_t': 'deit_tiny_patch16_224.pth'}
BUILDERS = ('mmpretrain', 'timm')
#: codes that make up for each other, without moving weights towards the float stream first
_UNMOVED = dict(type='round', ridge=None, share=0.0)
#: name -> arguments of get_scheme
RECIPES: dict[str, dict[str, Any]] = {
    'reference 8/8/8 noptf nolis': dict(name='fqvit_w8a8', ptf=False, lis=False, preset='reference'),
    'reference 8/8/4': dict(name='fqvit_w8a8_attn4', preset='reference'),
    'strict 8/8/4': dict(name='fqvit_w8a8_attn4'),
    'strict 8/8/8': dict(name='fqvit_w8a8'),
    'strict 8/8/8 nolis': dict(name='fqvit_w8a8', lis=False),
    'strict 8/8/4 omse': dict(name='fqvit_w8a8_attn4', observer='omse'),
    'strict 8/8/4 percentile': dict(name='fqvit_w8a8_attn4', observer='percentile'),
    'w6a6': dict(name='fqvit_w6a6'),
    'w6a6 nearest': dict(name='fqvit_w6a6', steps=[]),
    'w4a8': dict(name='fqvit_w4a8'),
    'w4a8 rows': dict(name='fqvit_w4a8', group_size=0),
    'w4a8 tuned': dict(name='fqvit_w4a8', steps=['round', 'tune']),
    'w4a8 unmoved': dict(name='fqvit_w4a8', steps=[_UNMOVED]),
    'w4a8 nearest': dict(name='fqvit_w4a8', steps=[]),
    'w4a4': dict(name='fqvit_w4a4'),
    'w4a4 rows': dict(name='fqvit_w4a4', group_size=0),
    'w4a4 groups of 8': dict(name='fqvit_w4a4', group_size=8),
    'w4a4 unmoved': dict(name='fqvit_w4a4', steps=['equalize', _UNMOVED]),
    'w4a4 nearest': dict(name='fqvit_w4a4', steps=[]),
    'w4a4 equalized': dict(name='fqvit_w4a4', steps=['equalize']),
    'w4a4 rounded': dict(name='fqvit_w4a4', steps=['round']),
    'w4a4 tuned': dict(name='fqvit_w4a4', steps=['equalize', 'round', 'tune']),
}
_EXAMPLES = """\
IMAGES holds calib/ and val/, flat folders of files named `<class index>_<anything>.jpg`, and weights/ with the
official ViT-Tiny and DeiT-Tiny files.

examples:
  python tools/accuracy.py ../shared/imagenet
  python tools/accuracy.py ../shared/imagenet --models vit_t --recipes 'strict 8/8/4' --json out.json
  python tools/accuracy.py ../shared/imagenet --recipes w4a4 --seeds 0 1 2 3 4
  python tools/accuracy.py ../shared/imagenet --via mmpretrain timm --recipes 'strict 8/8/4'
  python tools/accuracy.py ../shared/imagenet --recipes 'strict 8/8/4' --engines native openvino-qdq

A recipe may also be a config, one that tools/allocate.py wrote for instance, whose quant_scheme is then taken.
With several seeds, a second table has means over them, and one of engines the means of their differences.
With both libraries named, a table says how far apart their models of the same weights are.

exit codes: 0 done, 2 something is wrong with what was given (one line on stderr)
"""


@dataclass(frozen=True)
class Photos:
    """Photographs as a config's pipeline gives them: uint8 (N, 3, H, W) in BGR, and their classes (N,)."""

    images: Tensor
    labels: Tensor

    def batches(self, size: int) -> Iterator[dict[str, Any]]:
        """What a data preprocessor takes."""
        return ({'inputs': chunk} for chunk in self.images.split(size))

    def shuffled(self, seed: int) -> Photos:
        """The same photographs in the order of MMEngine's DefaultSampler with that seed."""
        order = torch.randperm(len(self.labels), generator=torch.Generator().manual_seed(seed))
        return Photos(self.images[order], self.labels[order])


@dataclass(frozen=True)
class Row:
    """One recipe's result, on the same images as the float model's."""

    model: str
    via: str  #: who built the model: mmpretrain or timm
    recipe: str
    seed: int  #: of the calibration images' order
    images: int
    top1: float
    changed: int  #: images whose being right or wrong differs from float
    seconds: float


#: (recipe, seed) -> the model, ready to predict, and its logits on val's images (N, classes)
Kept = dict[tuple[str, int], tuple[Any, Tensor]]


@dataclass(frozen=True)
class EngineRow:
    """One recipe's model in an engine, beside its simulation."""

    model: str
    recipe: str
    seed: int
    engine: str
    images: int
    simulated: float  #: top-1
    top1: float
    same: float  #: per cent of images with the simulation's answer
    equal: bool  #: whether all logits are the simulation's, bit by bit


@dataclass(frozen=True)
class Difference:
    """How far apart timm's and MMPretrain's models of the same weights are, in one recipe on the same images."""

    model: str
    recipe: str
    seed: int
    logits: float  #: largest absolute difference between two logits
    changed: int  #: images for which the first answer differs
    scales: int  #: how many there are, one for one; none in the float model
    apart: float  #: largest relative difference between two scales


def read_photos(folder: Path, pipeline: list[dict]) -> Photos:
    """Decode and resize every photograph of ``folder`` by the config's own test pipeline.

    Raises:
        ValueError: there is none.
    """
    files = sorted(folder.glob('*.jpg'))
    if not files:
        raise ValueError(f'{folder} has no .jpg files named <class index>_<anything>.jpg')
    dataset = DATASETS.build(dict(type='CustomDataset', data_root=str(folder), pipeline=pipeline, lazy_init=True))
    images = [dataset.pipeline({'img_path': str(file)})['inputs'] for file in files]
    return Photos(torch.stack(images), torch.tensor([int(file.name.split('_')[0]) for file in files]))


def load_model(name: str, weights: Path, via: str = 'mmpretrain') -> tuple[Any, Any]:
    """The config and the float classifier of ``name`` with the weights in ``weights``, built by ``via``."""
    cfg = load_config(CONFIGS / f'fqvit_{name}_w8a8_attn4.py')
    state = load_checkpoint_file(weights / WEIGHTS[name])
    if via == 'timm':
        cfg.model = dict(type='TimmClassifier', model_name=Path(WEIGHTS[name]).stem)
    else:
        state = fq.convert_state_dict(state)
    model = MODELS.build(dict(**cfg.model, data_preprocessor=cfg.data_preprocessor))
    model.load_state_dict(state)
    return cfg, model.eval()


def forward(model: Any, batch: dict[str, Any]) -> Tensor:
    """Logits of one batch."""
    return model(**model.data_preprocessor(batch, False), mode='tensor')


@torch.no_grad()
def predict(model: Any, photos: Photos, batch_size: int = 50) -> Tensor:
    """Logits (N, classes) of all photographs."""
    return torch.cat([forward(model, batch) for batch in photos.batches(batch_size)])


def evaluate(
    images: Path,
    name: str,
    recipes: Sequence[str],
    seeds: Sequence[int] = (0,),
    batch_size: int = 20,
    via: str = 'mmpretrain',
    kept: Kept | None = None,
    quantize_image: bool = False,
) -> Iterator[Row]:
    """Float first, then every recipe with every seed, each on a model of its own, which goes to ``kept`` if given.

    ``quantize_image`` does so for models whose config leaves the image in float.
    """
    cfg, model = load_model(name, images / 'weights', via)
    pipeline = cfg.test_dataloader.dataset.pipeline
    calib, val = (read_photos(images / split, pipeline) for split in ('calib', 'val'))
    kept = {} if kept is None else kept
    start = time.perf_counter()
    kept['float', 0] = model, predict(model, val)
    base = kept['float', 0][1].argmax(1) == val.labels
    yield _row((name, via), 'float', 0, base, base, start)
    for recipe, seed in itertools.product(recipes, seeds):
        start = time.perf_counter()
        _, model = load_model(name, images / 'weights', via)
        fq.quantize_model_(model, scheme_of(recipe, quantize_image or cfg.quant_scheme.input_quant))
        fq.calibrate_(model, calib.shuffled(seed).batches(batch_size), forward)
        fq.quant(model)
        kept[recipe, seed] = model, predict(model, val)
        hits = kept[recipe, seed][1].argmax(1) == val.labels
        yield _row((name, via), recipe, seed, hits, base, start)


def scheme_of(recipe: str, input_quant: bool) -> fq.QuantScheme:
    """The scheme of a recipe's name, or of a config that is one's own."""
    if recipe in RECIPES:
        return fq.get_scheme(**RECIPES[recipe], input_quant=input_quant)
    return parse_scheme(load_config(recipe).quant_scheme)


def _recipe(text: str) -> str:
    if text not in RECIPES and not (text.endswith('.py') and Path(text).is_file()):
        raise argparse.ArgumentTypeError(f'{text!r} is no config; the recipes are {", ".join(RECIPES)}')
    return text


def _row(model: tuple[str, str], recipe: str, seed: int, hits: Tensor, base: Tensor, start: float) -> Row:
    top1 = 100 * hits.float().mean().item()
    return Row(*model, recipe, seed, len(hits), top1, int((hits != base).sum()), time.perf_counter() - start)


@torch.no_grad()
def in_engines(images: Path, name: str, engines: Sequence[str], kept: Kept) -> Iterator[EngineRow]:
    """What other engines make of the models in ``kept``, on val's images."""
    cfg, _ = load_model(name, images / 'weights')
    val = read_photos(images / 'val', cfg.test_dataloader.dataset.pipeline)
    for (recipe, seed), (model, simulated) in kept.items():
        if recipe == 'float':
            continue
        inputs = torch.cat([model.data_preprocessor(batch, False)['inputs'] for batch in val.batches(50)])
        for engine in engines:
            run = deploy(model, inputs[:2], engine)
            logits = torch.cat([run(chunk) for chunk in inputs.split(10)])
            top1 = 100 * (logits.argmax(1) == val.labels).float().mean().item()
            expected = 100 * (simulated.argmax(1) == val.labels).float().mean().item()
            same = same_answers(logits, simulated)
            equal = torch.equal(logits, simulated)
            yield EngineRow(name, recipe, seed, engine, len(inputs), expected, top1, same, equal)


def compare(name: str, timms: Kept, theirs: Kept) -> Iterator[Difference]:
    """What timm's models of ``name`` differ by from MMPretrain's, recipe by recipe."""
    for (recipe, seed), (model, logits) in timms.items():
        twin, expected = theirs[recipe, seed]
        scales = (0, 0.0) if recipe == 'float' else scale_difference(model.model, twin)
        changed = int((logits.argmax(1) != expected.argmax(1)).sum())
        yield Difference(name, recipe, seed, float((logits - expected).abs().max()), changed, *scales)


def table(rows: Sequence[Row]) -> Table:
    """The results for a terminal."""
    result = Table('model', 'via', 'recipe', 'seed', 'images', 'top-1', 'changed', 'seconds')
    for row in rows:
        cells = (
            row.model,
            row.via,
            row.recipe,
            str(row.seed),
            str(row.images),
            f'{row.top1:.2f}',
            str(row.changed),
            f'{row.seconds:.0f}',
        )
        result.add_row(*cells)
    return result


def means_table(rows: Sequence[Row]) -> Table:
    """Means over seeds, for a terminal; how far from float, and the standard error that the seeds give a mean."""
    names = ('model', 'via', 'recipe', 'seeds', 'mean top-1', 'error', 'from float', 'lowest', 'highest')
    result = Table(*names, title='over the seeds')
    floats = {(row.model, row.via): row.top1 for row in rows if row.recipe == 'float'}
    for key in dict.fromkeys((row.model, row.via, row.recipe) for row in rows if row.recipe != 'float'):
        found = [row.top1 for row in rows if (row.model, row.via, row.recipe) == key]
        mean, error = _mean_and_error(found)
        figures = (mean, error, mean - floats[key[:2]], min(found), max(found))
        result.add_row(*key, str(len(found)), *(f'{figure:.2f}' for figure in figures))
    return result


def engine_means_table(rows: Sequence[EngineRow]) -> Table:
    """Engines' differences from the simulation over seeds, for a terminal, with the standard error of their mean."""
    result = Table('model', 'recipe', 'engine', 'seeds', 'from simulated', 'error', 'lowest', 'highest')
    for key in dict.fromkeys((row.model, row.recipe, row.engine) for row in rows):
        found = [row.top1 - row.simulated for row in rows if (row.model, row.recipe, row.engine) == key]
        mean, error = _mean_and_error(found)
        result.add_row(
            *key, str(len(found)), f'{mean:+.2f}', f'{error:.2f}', f'{min(found):+.2f}', f'{max(found):+.2f}'
        )
    return result


def _mean_and_error(found: Sequence[float]) -> tuple[float, float]:
    return statistics.mean(found), statistics.stdev(found) / len(found) ** 0.5


def engine_table(rows: Sequence[EngineRow]) -> Table:
    """Engines beside the simulation, for a terminal."""
    result = Table('model', 'recipe', 'seed', 'engine', 'images', 'simulated', 'top-1', 'same answer', 'equal')
    for r in rows:
        figures = (f'{r.simulated:.2f}', f'{r.top1:.2f}', f'{r.same:.2f}', 'yes' if r.equal else 'no')
        result.add_row(r.model, r.recipe, str(r.seed), r.engine, str(r.images), *figures)
    return result


def difference_table(differences: Sequence[Difference]) -> Table:
    """timm beside MMPretrain, for a terminal."""
    result = Table('model', 'recipe', 'seed', 'logits', 'other answers', 'scales', 'apart', title='timm - MMPretrain')
    for d in differences:
        scales = (str(d.scales), f'{d.apart:.1e}') if d.scales else ('', '')
        result.add_row(d.model, d.recipe, str(d.seed), f'{d.logits:.1e}', str(d.changed), *scales)
    return result


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=_EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('images', metavar='IMAGES', type=Path)
    parser.add_argument('--models', nargs='+', choices=WEIGHTS, default=list(WEIGHTS))
    parser.add_argument(
        '--via',
        nargs='+',
        choices=BUILDERS,
        default=['mmpretrain'],
        help='who builds the models',
    )
    parser.add_argument(
        '--recipes',
        nargs='+',
        type=_recipe,
        default=[name for name in RECIPES if 'tuned' not in name],
        metavar='RECIPE',
        help='a name, or CONFIG.py (default: all names but what takes an hour)',
    )
    parser.add_argument(
        '--engines', nargs='+', choices=ENGINES, default=[], help='run the quantized models there too, image included'
    )
    parser.add_argument('--seeds', nargs='+', type=int, default=[0], help="orders of calib's images (default: 0)")
    parser.add_argument('--batch-size', type=int, default=20, metavar='N', help='of calibration (default: 20)')
    parser.add_argument('--json', type=Path, metavar='FILE', help='write the rows there too')
    return parser


def _line(row: Row) -> str:
    return f'{row.model} ({row.via}): {row.recipe}, seed {row.seed}: {row.top1:.2f} ({row.seconds:.0f} s)'


def main(argv: Sequence[str] | None = None) -> int:
    """Evaluate, print the table, write JSON."""
    args = _parser().parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))  # an order named twice is one
    console = Console()
    rows: list[Row] = []
    differences: list[Difference] = []
    deployed: list[EngineRow] = []
    try:
        if args.json is not None:
            check_writable(args.json)
        for name in args.models:
            kept: dict[str, Kept] = {via: {} for via in args.via}
            for via in args.via:
                arguments = (args.images, name, args.recipes, args.seeds, args.batch_size, via, kept[via])
                for row in evaluate(*arguments, quantize_image=bool(args.engines)):
                    rows.append(row)
                    console.print(_line(row), highlight=False)
            if len(kept) == len(BUILDERS):
                differences += compare(name, kept['timm'], kept['mmpretrain'])
            if 'mmpretrain' in kept:
                for engine_row in in_engines(args.images, name, args.engines, kept['mmpretrain']):
                    deployed.append(engine_row)
                    console.print(engine_row, highlight=False)
    except (ValueError, OSError) as error:
        print(f'accuracy.py: {error}', file=sys.stderr)
        return 2
    console.print(table(rows))
    if len(args.seeds) > 1:
        console.print(means_table(rows))
    if differences:
        console.print(difference_table(differences))
    if deployed:
        console.print(engine_table(deployed))
        if len(args.seeds) > 1:
            console.print(engine_means_table(deployed))
    if args.json is not None:
        write_json(args.json, [asdict(row) for row in (*rows, *deployed)])
    return 0


if __name__ == '__main__':
    sys.exit(main())
