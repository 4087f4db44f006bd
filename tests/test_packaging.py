"""Wheel and sdist, installed from a file into an environment of their own and used outside the checkout.

Oracle: the files of the checkout, and the commands as a user types them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
import torch

import fqvit_plugin as fq

from .projects import CLASSES, float_checkpoint, project, write_images

ROOT = Path(__file__).resolve().parents[1]
FILES = ('pyproject.toml', 'setup.py', 'MANIFEST.in', 'README.md', 'LICENSE', 'CHANGELOG.md', 'CITATION.cff')
FOLDERS = ('fqvit_plugin', 'fqvit_cli', 'configs', 'tools', 'docs')
ENV = {k: v for k, v in os.environ.items() if k != 'PYTHONPATH'} | {
    'OMP_NUM_THREADS': '1',
    'PYTHONWARNINGS': 'ignore',
}

pytest.importorskip('build', reason='the extra dev brings it')


def call(*command, cwd, status=0):
    done = subprocess.run([str(c) for c in command], cwd=cwd, env=ENV, capture_output=True, text=True, timeout=300)
    assert done.returncode == status, (done.stdout + done.stderr)[-3000:]
    return done.stdout + done.stderr


@pytest.fixture(scope='module')
def built(tmp_path_factory):
    """The sdist, the wheel built from it, and a wheel built from the sources directly."""
    source = tmp_path_factory.mktemp('source')
    for name in FILES:
        shutil.copy(ROOT / name, source)
    for name in FOLDERS:
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns('__pycache__'))
    from_sdist, direct = source / 'from_sdist', source / 'direct'
    build = [sys.executable, '-m', 'build', '--no-isolation']
    call(*build, '--outdir', from_sdist, '.', cwd=source)
    call(*build, '--wheel', '--outdir', direct, '.', cwd=source)
    (sdist,) = from_sdist.glob('*.tar.gz')
    (wheel,) = from_sdist.glob('*.whl')
    (other,) = direct.glob('*.whl')
    return sdist, wheel, other


@pytest.fixture(scope='module')
def installed(built, tmp_path_factory):
    """Programs of an environment with the wheel; the running environment lends its requirements."""
    home = tmp_path_factory.mktemp('env')
    venv.create(home, with_pip=False)
    (site,) = home.glob('lib/python*/site-packages')
    # a folder that a .pth names is only put on the path: an editable install of ours in there stays without effect
    lent = [Path(p) for p in sys.path if Path(p).name == 'site-packages']
    (site / 'lent.pth').write_text('\n'.join(map(str, lent)))
    for name in {file for folder in lent for file in folder.glob('distutils-precedence.pth')}:
        # from Python 3.12 on, setuptools gives distutils, for which mmengine asks; read after lent.pth
        shutil.copy(name, site / 'lent_distutils.pth')
    python = home / 'bin' / 'python'
    call(sys.executable, '-m', 'pip', '--python', python, 'install', '--no-deps', '--no-index', built[1], cwd=home)
    return python.parent


@pytest.fixture(scope='module')
def job(installed, tmp_path_factory):
    """A user's folder: images, weights, a config that inherits ours, and the same in the new style."""
    root = tmp_path_factory.mktemp('user')
    images = write_images(root / 'images', {'train': 3, 'val': 1})
    mine = project(images, root, 'vit')
    float_checkpoint(mine, root / 'float.pth')
    for key in ('calib_dataloader', 'quant_scheme', 'custom_hooks', 'work_dir', 'load_from'):
        mine.pop(key)
    mine.dump(root / 'mine.py')
    base = call(installed / 'fqvit', 'configs', '_base_/fqvit', cwd=root).strip()
    data = f"dataset=dict(_delete_=True, type='CustomDataset', data_root={str(images / 'train')!r})"
    calib = f'calib_dataloader = dict(batch_size=3, num_workers=0, {data})\n'
    (root / 'old.py').write_text(f"_base_ = ['./mine.py', {base!r}]\n{calib}")
    (root / 'new.py').write_text(
        'from mmengine.config import read_base\n'
        'with read_base():\n    from fqvit_plugin.configs.fqvit import *\n'
        f"default_scope = 'mmpretrain'\nmodel = {dict(mine.model)!r}\n"
        f'data_preprocessor = {dict(mine.data_preprocessor)!r}\n'
        f'test_dataloader = {mine.test_dataloader.to_dict()!r}\n'
        f'calib_dataloader = dict(batch_size=3, num_workers=0, {data.replace("_delete_=True, ", "")})\n'
    )
    return root


def test_wheel_holds_the_configs_and_tools_of_the_checkout(built):
    with zipfile.ZipFile(built[1]) as wheel:
        names = set(wheel.namelist())
        for folder in ('configs', 'tools'):
            for path in sorted((ROOT / folder).rglob('*.py')):
                name = f'fqvit_plugin/.mim/{path.relative_to(ROOT).as_posix()}'
                assert wheel.read(name) == path.read_bytes()
                names.discard(name)
        assert not [name for name in names if '.mim/' in name]
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / 'fqvit_plugin/native/src').iterdir()}
    assert 'fqvit_plugin/native/src/engine.cpp' in sources
    assert sources <= names  # the native engine is compiled where it is used
    assert {'fqvit_plugin/py.typed', 'fqvit_plugin/configs/fqvit.py', 'fqvit_cli/doctor.py'} <= names
    assert not [name for name in names if name.startswith(('tests/', 'configs/', 'tools/', 'docs/'))]


def test_sdist_builds_the_wheel_the_sources_build(built):
    with zipfile.ZipFile(built[1]) as wheel, zipfile.ZipFile(built[2]) as other:
        assert {i.filename: i.CRC for i in wheel.infolist()} == {i.filename: i.CRC for i in other.infolist()}


def test_metadata(built):
    with zipfile.ZipFile(built[1]) as wheel:
        (name,) = (n for n in wheel.namelist() if n.endswith('.dist-info/METADATA'))
        metadata = wheel.read(name).decode()
        assert any(n.endswith('licenses/LICENSE') or n.endswith('dist-info/LICENSE') for n in wheel.namelist())
    assert f'\nVersion: {fq.__version__}\n' in metadata
    assert re.search('^Name: fqvit[-_]plugin$', metadata, re.MULTILINE)  # older setuptools write the hyphen
    assert '\nDescription-Content-Type: text/markdown\n' in metadata
    extras = set(re.findall(r'^Provides-Extra: (.+)$', metadata, re.MULTILINE))
    assert {'demo', 'dev', 'docs', 'export'} <= extras


def test_the_installed_package_is_the_one_that_runs(installed, job):
    code = "import importlib.util as u; print(u.find_spec('fqvit_plugin').origin)"
    package = Path(call(installed / 'python', '-c', code, cwd=job).strip())
    assert installed.parent in package.parents
    assert call(installed / 'fqvit', '--version', cwd=job) == f'fqvit_plugin {fq.__version__}\n'
    said = call(installed / 'fqvit', '--help', cwd=job)
    for tool in (ROOT / 'tools').glob('*.py'):
        assert (f'  {tool.stem} ' in said) is not tool.stem.startswith('_')


def test_fqvit_calibrate_with_a_read_base_config(installed, job):
    said = call(
        installed / 'fqvit', 'calibrate', 'new.py', 'float.pth', '--out', 'new.pth', '--batches', '2', cwd=job
    )
    assert 'calibrated on 6 images; saved to new.pth' in said
    info = torch.load(job / 'new.pth', weights_only=True)['meta']['fqvit']
    assert fq.QuantScheme.from_dict(info['scheme']) == fq.get_scheme('fqvit_w8a8')


def test_mim_runs_our_tools(installed, job):
    mim = [installed / 'python', '-m', 'mim', 'run', 'fqvit_plugin', 'calibrate']
    said = call(*mim, 'old.py', 'float.pth', '--out', 'old.pth', '--batches', '2', cwd=job)
    assert str(Path('fqvit_plugin', '.mim', 'tools', 'calibrate.py')) in said
    assert 'calibrated on 6 images; saved to old.pth' in said


def test_mim_tests_a_config_that_inherits_the_installed_one(installed, job):
    mim = [installed / 'python', '-m', 'mim', 'test', 'mmpretrain', 'old.py', '--checkpoint', 'float.pth']
    said = call(*mim, '--work-dir', 'work', '--cfg-options', 'log_level=INFO', cwd=job)
    assert f'calibrated on {3 * CLASSES} images in 3 batches' in said
    assert 'accuracy/top1' in said
