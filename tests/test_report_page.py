"""What people look at: terminal, page, MMEngine's visualizer. Oracles: the records, a real browser, TensorBoard."""

from __future__ import annotations

import dataclasses
import html
import io
import json
import math
import re
import shutil
from html.parser import HTMLParser

import calibrate
import numpy as np
import pytest
from rich.console import Console

import fqvit_plugin as fq
from fqvit_plugin.analysis.collect import analyse
from fqvit_plugin.analysis.page import PageInfo, render_page, write_text
from fqvit_plugin.analysis.svg import bars
from fqvit_plugin.analysis.terminal import format_decibels, format_share, print_report
from fqvit_plugin.analysis.visualize import histogram_image

from . import models
from .projects import float_checkpoint, project, runner, write_images


@pytest.fixture(scope='module')
def results():
    model = models.vit()
    report = fq.quantize_model_(model, fq.get_scheme('fqvit_w8a8_attn4'))
    fq.calibrate_(model, models.batches(2))
    return report, analyse(model, models.batches(2), lambda m, b: m(b, mode='tensor'))


@pytest.fixture(scope='module')
def images(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'), {'train': 4, 'val': 1})


@pytest.fixture(scope='module')
def page(results):
    return render_page(PageInfo('VisionTransformer tiny', '2026-01-01', 'c.py', '4 images', {'torch': '2'}), *results)


class _Tags(HTMLParser):
    """Every start tag with its attributes, and whether tags are closed in order."""

    VOID = ('meta', 'link', 'input', 'img', 'br', 'wbr', 'rect', 'line', 'path')

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def printed(results, width=80, **options) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    print_report(console, *results)
    return console.file.getvalue()


@pytest.mark.parametrize('width', [60, 80, 120])
def test_the_terminal_gets_one_screen_within_its_width(results, width):
    text = printed(results, width)
    lines = text.splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) <= 40
    worst = results[1].worst(1)[0]
    assert width < 80 or worst.path.removeprefix('backbone.') in text  # narrower terminals fold it
    assert f'{worst.sqnr:.1f} dB' in text


def test_colour_in_a_terminal_only(results, monkeypatch):
    monkeypatch.delenv('NO_COLOR', raising=False)
    assert '\x1b[' not in printed(results)
    assert '\x1b[' in printed(results, force_terminal=True, color_system='standard')
    assert '\x1b[' not in str(results[0])


def test_without_an_analysis_there_are_sizes(results):
    console = Console(file=io.StringIO(), width=80)
    print_report(console, results[0])
    assert 'MB quantized' in console.file.getvalue()


@pytest.mark.parametrize(('value', 'text'), [(None, '–'), (math.nan, '–'), (math.inf, 'exact'), (12.34, '12.3 dB')])
def test_decibels_as_text(value, text):
    assert format_decibels(value) == text


@pytest.mark.parametrize(('share', 'text'), [(0, '0 %'), (0.021, '2.1 %'), (0.0001, '100 ppm')])
def test_shares_as_text(share, text):
    assert format_share(share) == text


def test_the_page_is_one_file_with_every_tensor(page, results):
    tags = _Tags(page)
    assert not tags.open
    assert not [a for _, a in tags.tags if 'src' in a]
    assert {a['href'] for t, a in tags.tags if 'href' in a and t != 'link'} >= {'#errors', '#table'}
    assert all(a['href'].startswith('#') for t, a in tags.tags if t == 'a')
    assert '://' not in page
    text = html.unescape(page.replace('<wbr>', ''))
    for record in results[1].tensors:
        assert f'<th scope="row">{record.path}</th>' in text
    for path in results[0].left_float:
        assert path in text


def test_what_comes_from_outside_is_escaped(results):
    report, analysis = results
    evil = '<script>alert("x")</script>'
    tensor = dataclasses.replace(analysis.tensors[0], path=evil, observer=evil, bits=evil, kind=evil)
    bad_report = dataclasses.replace(report, left_float={evil: evil})
    bad = dataclasses.replace(analysis, tensors=(tensor, *analysis.tensors))
    page = render_page(PageInfo(evil, evil, evil, evil, {evil: evil}), bad_report, bad)
    assert '<script>alert' not in page.replace('<wbr>', '')
    assert page.count('<script>') == 1
    assert not _Tags(page).open


def test_odd_numbers_do_not_break_the_page(results):
    """Tensors of zeros, exact ones, and a quantizer of somebody else's without a grid."""
    report, analysis = results
    odd = [
        dataclasses.replace(analysis.tensors[0], sqnr=value, total_sqnr=value, covered=None, scales=None)
        for value in (math.nan, math.inf, -math.inf)
    ]
    bad = dataclasses.replace(analysis, tensors=tuple(odd))
    assert not _Tags(render_page(PageInfo('m', 'd'), report, bad)).open
    assert 'nan' not in bars([math.nan], [math.inf], 50, ['good'], [''], '')
    json.dumps(bad.to_dict(), allow_nan=False)


def test_bars_have_the_height_of_their_values():
    drawn = bars([25.0], [None], 50.0, ['good'], ['a'], 'b')
    assert re.search(r'class="good" x="36" y="50" width="228" height="50"', drawn)


def test_a_page_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / 'deep' / 'a.html'
    write_text(path, 'old')

    def fail(*_):
        raise OSError('disk full')

    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(OSError, match='disk full'):
        write_text(path, 'new')
    assert path.read_text() == 'old'
    assert [p.name for p in path.parent.iterdir()] == ['a.html']


def contrast(a: str, b: str) -> float:
    """WCAG 2's contrast ratio of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        colour = colour if len(colour) == 7 else '#' + ''.join(c * 2 for c in colour[1:])
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_text_has_contrast_in_light_and_dark(page):
    for theme in re.findall(r':root \{([^}]*--accent[^}]*)\}', page):
        colour = dict(re.findall(r'--([\w-]+): (#\w+)', theme))
        for name in ('text', 'soft', 'accent', 'good', 'fair', 'low'):
            for ground in ('bg', 'card'):
                assert contrast(colour[name], colour[ground]) >= 4.5, (name, ground)
    assert len(re.findall(r'--accent: #', page)) == 2


@pytest.fixture(scope='module')
def browser():
    api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    path = shutil.which('chromium') or shutil.which('chromium-browser') or shutil.which('google-chrome')
    if path is None:
        pytest.skip('no Chromium on this machine')
    with api.sync_playwright() as engine:
        chromium = engine.chromium.launch(executable_path=path, args=['--no-sandbox'])
        yield chromium
        chromium.close()


def visit(browser, file, width=1440, **options):
    """Open the file; also what the console said and what was requested."""
    tab = browser.new_page(viewport=dict(width=width, height=900), **options)
    said, requests = [], []
    tab.on('console', lambda message: said.append(message.text))
    tab.on('pageerror', lambda error: said.append(str(error)))
    tab.on('request', lambda request: requests.append(request.url))
    tab.goto(file.as_uri())
    return tab, said, requests


@pytest.fixture
def file(page, tmp_path):
    write_text(tmp_path / 'r.html', page)
    return tmp_path / 'r.html'


@pytest.mark.parametrize('width', [360, 390, 1440])
@pytest.mark.parametrize('script', [True, False])
def test_in_a_browser_nothing_is_too_wide_or_asked_for(browser, file, results, width, script):
    tab, said, requests = visit(browser, file, width, java_script_enabled=script)
    # Playwright's own evaluate works without the page's scripts
    for element in tab.query_selector_all('summary'):
        element.click()
    assert tab.evaluate('document.documentElement.scrollWidth') <= width
    assert tab.locator('#tensors tbody tr').count() == len(results[1].tensors)
    assert tab.locator('h1').count() == 1
    assert [h.inner_text() for h in tab.query_selector_all('h2')][:2] == ['Error of every tensor', 'Ranges']
    assert tab.locator('#tools').is_visible() == script
    assert said == []
    assert requests == [file.as_uri()]
    tab.close()


def test_in_a_browser_the_table_sorts_and_filters(browser, file, results):
    tab, said, _ = visit(browser, file)
    button = tab.get_by_role('button', name='SQNR, dB')
    button.focus()
    tab.keyboard.press('Enter')
    first = tab.locator('#tensors tbody tr').first.locator('th').inner_text()
    assert first == min(results[1].tensors, key=lambda r: r.sqnr).path
    tab.keyboard.press('Enter')
    first = tab.locator('#tensors tbody tr').first.locator('th').inner_text()
    assert first == max(results[1].tensors, key=lambda r: r.sqnr).path
    tab.get_by_label('Find').fill('logits_act')
    shown = tab.locator('#tensors tbody tr:visible').count()
    assert shown == sum('logits_act' in r.path for r in results[1].tensors)
    assert tab.get_by_role('status').inner_text().startswith(f'{shown} of ')
    tab.get_by_role('button', name='Open all').click()
    assert tab.locator('#histograms details:not([open])').count() == 0
    assert said == []
    tab.close()


def test_the_hook_writes_the_page_and_local_plots(images, tmp_path):
    cfg = project(images, tmp_path / 'work', visualizer=dict(type='UniversalVisualizer'))
    cfg.visualizer.vis_backends = [dict(type='LocalVisBackend')]
    cfg.custom_hooks[0].update(report='report.html', visualize=True)
    float_checkpoint(cfg, tmp_path / 'x.pth')
    made = runner(cfg)
    made.test()
    page = (tmp_path / 'work' / 'report.html').read_text(encoding='utf-8')
    assert 'backbone.<wbr>layers.1.<wbr>ffn.<wbr>out_act' in page
    assert str(tmp_path) not in page
    (scalars,) = (tmp_path / 'work').rglob('scalars.json')
    keys = set().union(*(json.loads(line) for line in scalars.read_text().splitlines()))
    assert {'quant/outputs_sqnr', 'quant/agreement', 'quant_scale/backbone.residual_act'} <= keys
    assert len(list((tmp_path / 'work').rglob('vis_image/quant_histogram.*.png'))) == 8


def test_the_hook_fills_tensorboard_also_from_a_calibrated_checkpoint(images, tmp_path):
    events = pytest.importorskip(
        'tensorboard.backend.event_processing.event_accumulator', reason='tensorboard is not installed'
    )
    cfg = project(images, tmp_path / 'first')
    float_checkpoint(cfg, tmp_path / 'x.pth')
    runner(cfg).test()
    cfg = project(images, tmp_path / 'work', visualizer=dict(type='UniversalVisualizer'))
    cfg.visualizer.vis_backends = [dict(type='TensorboardVisBackend')]
    cfg.custom_hooks[0].update(visualize=True)
    cfg.load_from = str(tmp_path / 'first' / 'calibrated.pth')
    made = runner(cfg)
    made.test()
    made.visualizer.close()
    (file,) = (tmp_path / 'work').rglob('events.out.*')
    read = events.EventAccumulator(str(file), size_guidance={'images': 0, 'histograms': 0, 'scalars': 0}).Reload()
    tags = read.Tags()
    quantizers = [n for n, m in made.model.named_modules() if n]  # the float model again: no quantizer is left
    assert not any('act' in n.rsplit('.')[-1].split('_') for n in quantizers)
    assert 'quant_values/backbone.layers.0.attn.logits_act' in tags['histograms']
    assert 'quant_sqnr/backbone.layers.0.attn.qkv' in tags['scalars']
    assert len(tags['images']) == 8
    histogram = read.Histograms('quant_values/backbone.layers.0.attn.qkv')[0].histogram_value
    weight = made.model.get_submodule('backbone.layers.0.attn.qkv').weight
    assert histogram.num == sum(histogram.bucket) == pytest.approx(weight.numel(), abs=weight.shape[0])
    assert histogram.max == pytest.approx(float(weight.detach().abs().max()), rel=0.02)


def test_the_hook_writes_the_page_under_training(images, tmp_path):
    cfg = project(images, tmp_path / 'work', train_cfg__max_epochs=1)
    cfg.custom_hooks[0].update(report='report.html')
    runner(cfg).train()
    assert 'backbone.<wbr>layers.1' in (tmp_path / 'work' / 'report.html').read_text(encoding='utf-8')


def test_the_hook_refuses_a_page_that_is_none():
    with pytest.raises(ValueError, match=r"such as report\.html, got 'report\.txt'"):
        fq.QuantHook(report='report.txt')


def test_a_histogram_image():
    image = histogram_image((0, 4, 1), bin_width=2, height=104)
    assert image.shape == (104, 6, 3)
    assert image.dtype == np.uint8
    filled = (image[..., 0] == 31).sum(0)
    assert filled.tolist() == [0, 0, 100, 100, 50, 50]


@pytest.fixture(scope='module')
def job(images, tmp_path_factory):
    root = tmp_path_factory.mktemp('job')
    cfg = project(images, root / 'work')
    float_checkpoint(cfg, root / 'x.pth')
    cfg.dump(root / 'config.py')
    return str(root / 'config.py'), str(root / 'x.pth')


def test_the_tool_writes_page_and_figures(job, tmp_path, capsys):
    page, figures = tmp_path / 'r.html', tmp_path / 'r.json'
    argv = [*job, '--out', str(tmp_path / 'q.pth'), '--batches', '2', '--report', str(page), '--json', str(figures)]
    assert calibrate.main(argv) == 0
    said = capsys.readouterr().out
    assert '\x1b[' not in said
    assert str(page) in said
    told = json.loads(figures.read_text())
    tensors = told['tensors']
    assert fq.QuantScheme.from_dict(told['scheme']) == fq.get_scheme('fqvit_w8a8_attn4')
    assert told['quantized_bytes'] < told['float_bytes']
    assert {layer['path'] for layer in told['layers']} >= {t['path'] for t in tensors}
    text = page.read_text(encoding='utf-8').replace('<wbr>', '')
    assert all(f'<th scope="row">{t["path"]}</th>' in text for t in tensors)
    assert '<h1>config</h1>' in text
    assert str(tmp_path) not in text


def test_ctrl_c_while_measuring_leaves_nothing(job, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(calibrate, 'analyse_on', interrupt)
    page = tmp_path / 'r.html'
    assert calibrate.main([*job, '--out', str(tmp_path / 'q.pth'), '--batches', '1', '--report', str(page)]) == 130
    assert 'nothing was written' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--report', 'r.txt'], 'writes a web page'),
        (['--report', 'there.html'], 'there.html exists; add --force'),
        (['--json', 'folder'], 'folder is a folder'),
        (['--report', 'there.html/r.html', '--force'], 'cannot be written'),
        (['--json', 'q.pth'], 'must be different files'),
    ],
)
def test_a_bad_path_is_an_early_error(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'there.html').write_text('precious')
    (tmp_path / 'folder').mkdir()
    assert calibrate.main(['no_config.py', 'x.pth', '--out', 'q.pth', *options]) == 2
    assert message in capsys.readouterr().err  # before the config, which does not exist, was looked at
    assert (tmp_path / 'there.html').read_text() == 'precious'
