"""tools/analyze.py and its page.

Oracles: the library's own measurement of the same checkpoint; the words that every mistake must be answered with; and
the page's text, read by a parser that knows which tags must close.
"""

from __future__ import annotations

import base64
import io
import json
import re

import analyze
import calibrate
import pytest
import torch
from PIL import Image

import fqvit_plugin as fq
from fqvit_plugin.analysis.collect import analyse
from fqvit_plugin.analysis.page import PageInfo, render_page
from fqvit_plugin.analysis.svg import bands
from fqvit_plugin.apis import load_config
from fqvit_plugin.calibration import CalibrationSet, forward_of
from fqvit_plugin.sensitivity.channels import channel_ranges
from fqvit_plugin.sensitivity.measure import measure_sensitivity
from fqvit_plugin.sensitivity.page import Photo, sensitivity_sections, thumbnail
from fqvit_plugin.sensitivity.records import ImageEffect, Sensitivity
from fqvit_plugin.sensitivity.switches import Switches
from fqvit_plugin.sensitivity.units import units_of

from . import models
from .projects import build, float_checkpoint, project, write_images
from .test_report_page import _Tags, browser, visit

__all__ = ['browser']  # a fixture


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    """A config, its float weights, and the checkpoint that calibrate.py makes of them."""
    root = tmp_path_factory.mktemp('analyze')
    images = write_images(root / 'images', {'train': 4, 'val': 1})
    cfg = project(images, root / 'work', 'vit')
    float_checkpoint(cfg, root / 'float.pth')
    cfg.dump(root / 'config.py')
    config, weights, calibrated = (str(root / name) for name in ('config.py', 'float.pth', 'q.pth'))
    assert calibrate.main([config, weights, '--out', calibrated, '--batches', '3']) == 0
    return config, weights, calibrated


def test_it_writes_what_the_library_measures(job, tmp_path, capsys):
    config, _, calibrated = job
    out, page = tmp_path / 's.json', tmp_path / 's.html'
    argv = [config, calibrated, '--images', '6', '--batches', '3', '--weight-bits', '4']
    assert analyze.main([*argv, '--json', str(out), '--html', str(page)]) == 0
    printed = capsys.readouterr().out
    assert '6 images, everything quantized: KL' in printed
    assert 'residual stream' in printed
    data = json.loads(out.read_text())
    found = Sensitivity.from_dict({k: v for k, v in data.items() if k != 'scheme'})
    cfg = load_config(config)
    model = build(cfg)
    fq.load_quantized_(model, calibrated)
    images = CalibrationSet.build(cfg, 3)
    units = units_of(Switches(model).layers, ['group'])
    batches = list(images.load([[0, 1, 2, 3], [4, 5]]))
    expected = measure_sensitivity(model, batches, units, forward_of(model))
    ours = {e.name: e for e in found.entries if e.unit == 'group'}
    assert {e.name: e.only.kl for e in expected.entries} == {k: e.only.kl for k, e in ours.items()}
    assert found.quantized.kl == expected.quantized.kl
    assert found.float_top1 is not None  # image folders have labels
    assert {e.bits for e in found.entries if e.kind == 'weights' and e.unit == 'tensor'} == {4, 8}
    text = page.read_text()
    for anchor in ('effects', 'per-tensor', 'channels', 'attention', 'images', 'errors', 'table'):
        assert text.count(f'<section id="{anchor}"') == 1
        assert f'href="#{anchor}"' in text
    assert not _Tags(text).open
    assert len(re.findall(r'<img src="data:image/jpeg;base64,', text)) == 6
    assert str(tmp_path) not in text


def test_float_weights_are_calibrated_first_and_give_the_same(job, tmp_path):
    config, weights, calibrated = job
    kl = []
    for i, checkpoint in enumerate((weights, calibrated)):
        out = tmp_path / f'{i}.json'
        argv = [config, checkpoint, '--batches', '3', '--images', '4', '--units', 'block', '--directions', 'without']
        assert analyze.main([*argv, '--json', str(out)]) == 0
        kl.append([e['without']['kl'] for e in json.loads(out.read_text())['entries']])
    assert kl[0] == kl[1]


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--images', '0'], '--images must be at least 1'),
        (['--html', 'page.txt'], '--html writes a web page: call it page.txt.html'),
        (['--json', '.'], 'is a folder: name a file in it'),
        (['--sort', 'without', '--directions', 'only'], '--sort without: that direction is not measured'),
        (['--weight-bits', '1'], 'bits must be a whole number from 2 to 16, got 1'),
        (['--cfg-options', 'calib_dataloader.dataset.data_root=gone'], 'calib_dataloader cannot be built'),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(job, capsys, options, message):
    config, _, calibrated = job
    assert analyze.main([config, calibrated, *options]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('analyze.py: ')
    assert message in last


def test_what_exists_is_kept(job, tmp_path, capsys):
    out = tmp_path / 's.json'
    out.write_text('precious')
    assert analyze.main([*job[::2], '--json', str(out)]) == 2
    assert '--force' in capsys.readouterr().err
    assert out.read_text() == 'precious'


def test_channels_by_hand():
    data = models.batches(2)
    model = models.quantized(models.vit(), data)
    paths = ['backbone.residual_act', 'backbone.layers.0.norm1_act', 'backbone.layers.0.attn.qkv']
    residual, normed, weight = channel_ranges(model, data, paths)
    layer = model.get_submodule(paths[2])
    assert weight.before == tuple(tuple(getattr(layer.weight, f)(1).tolist()) for f in ('amin', 'amax'))
    q = model.get_submodule(paths[0]).quantizer
    assert residual.grid[0] == pytest.approx((-q.zero_point * q.scale).tolist())
    assert residual.grid[1] == pytest.approx(((255 - q.zero_point) * q.scale).tolist())
    # the integer LayerNorm puts out its result without calling the quantizer of it
    for path, writer, found in ((paths[0], paths[0], residual), (paths[1], 'backbone.layers.0.ln1', normed)):
        for switch, module, ends in ((fq.dequant, path, found.before), (fq.quant, writer, found.after)):
            switch(model)
            seen: list[torch.Tensor] = []
            hook = model.get_submodule(module).register_forward_hook(lambda m, a, y, to=seen: to.append(y.clone()))
            with torch.no_grad():
                for batch in data:
                    model(batch)
            hook.remove()
            x = torch.cat(seen).flatten(0, 1)
            assert ends == (tuple(x.amin(0).tolist()), tuple(x.amax(0).tolist()))


@pytest.mark.parametrize('width', [390, 1440])
def test_in_a_browser_nothing_is_too_wide_or_asked_for(job, tmp_path, browser, width):
    config, _, calibrated = job
    page = tmp_path / 's.html'
    assert analyze.main([config, calibrated, '--images', '2', '--batches', '3', '--html', str(page)]) == 0
    tab, said, requests = visit(browser, page, width)
    for element in tab.query_selector_all('summary'):
        element.click()
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    assert max(tab.evaluate('[...document.querySelectorAll("td svg")].map(s => s.clientHeight)')) <= 12
    assert tab.evaluate('[...document.images].every(i => i.complete && i.naturalWidth)')
    assert said == []
    assert [r for r in requests if not r.startswith('data:')] == [page.as_uri()]
    tab.close()


def test_a_picture_keeps_its_colours():
    """A red square in the BGR of MMPretrain's pipelines."""
    red = torch.zeros(3, 300, 200, dtype=torch.uint8)
    red[2] = 255
    kind, _, text = thumbnail(red).partition(',')
    assert kind == 'data:image/jpeg;base64'
    picture = Image.open(io.BytesIO(base64.b64decode(text)))
    assert picture.size == (75, 112)
    r, g, b = picture.getpixel((30, 50))
    assert r > 240
    assert max(g, b) < 15


def test_names_from_outside_are_escaped_and_nothing_is_shown_empty():
    data = models.batches(1)
    model = models.quantized(models.vit(), data)
    analysis = analyse(model, data)
    result = measure_sensitivity(model, data, units_of(Switches(model).layers, ['group']))
    evil = '<script>alert(1)</script>'
    photos = [Photo(ImageEffect(0, 0.5, 1, 2), evil, evil, evil + '2')]
    sections = sensitivity_sections(result, analysis, photos=photos)
    assert [s.anchor for s in sections] == ['effects', 'attention', 'images']  # no tensors, hence no plots of them
    model = models.vit()
    report = fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8'))
    page = render_page(PageInfo('m', 'd'), report, analysis, sections)
    assert '<script>alert' not in page
    assert not _Tags(page).open


def test_bands_by_hand():
    """Two channels of -1 to 4 and 0 to 1; roots of the ends: from -1 to 2, so zero lies two thirds down."""
    svg = bands([((-1.0, 0.0), (4.0, 1.0), 'seen')], 'two')
    assert 'd="M0 66.67V0H150V33.33H300V66.67H150V100H0Z"' in svg
