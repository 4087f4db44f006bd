"""The command ``fqvit`` and its doctor.

Oracle: the files of tools/ and configs/, and small environments written down by hand.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import fqvit_cli
import fqvit_plugin as fq
from fqvit_cli import doctor

ROOT = Path(__file__).resolve().parents[1]
ASKED = ['torch>=2.1', 'numpy>=1.26', 'mmcv-lite<2.4,>=2.0.0', 'setuptools<82,>=66.1', 'mmpretrain==1.2.0']
SOUND = {
    'torch': '2.8.0+cu128',
    'numpy': '2.4.6',
    'mmcv-lite': '2.2.0',
    'setuptools': '81.0.0',
    'mmpretrain': '1.2.0',
}


@pytest.fixture
def folder(tmp_path):
    """A package beside tools of its own, of which one needs its neighbour."""
    tools = tmp_path / 'tools'
    tools.mkdir()
    (tmp_path / 'fqvit_plugin').mkdir()
    (tmp_path / 'pyproject.toml').touch()
    (tools / '_shared.py').write_text('ANSWER = 42\n')
    (tools / 'search.py').write_text(
        '"""Look for something.\n\nAt length."""\nimport argparse, sys\nfrom _shared import ANSWER\n'
        "def main(argv=None):\n    parser = argparse.ArgumentParser()\n    parser.add_argument('status', type=int)\n"
        '    print(parser.prog, ANSWER)\n    return parser.parse_args(argv).status\n'
    )
    (tools / 'send.py').write_text('def main(argv): pass\n')
    return tmp_path


@pytest.fixture
def here(folder, monkeypatch):
    monkeypatch.setattr(fqvit_cli, 'package_folder', lambda: folder / 'fqvit_plugin')
    return folder


def test_tools_are_discovered_and_helpers_are_not(folder):
    assert list(fqvit_cli.tools(folder / 'tools')) == ['search', 'send']
    assert fqvit_cli.summary(folder / 'tools' / 'search.py') == 'Look for something.'


def test_every_tool_of_ours_is_a_command(capsys):
    names = {path.stem for path in (ROOT / 'tools').glob('[a-z]*.py')}
    assert set(fqvit_cli.tools()) == names
    assert not names & set(fqvit_cli.BUILT_IN)
    assert fqvit_cli.main(['--help']) == 0
    lines = capsys.readouterr().out.splitlines()
    for name in names | set(fqvit_cli.BUILT_IN):
        (line,) = (line for line in lines if line.split()[:1] == [name])
        assert len(line.split()) > 3, f'{name} says nothing of what it does'
    for path in fqvit_cli.tools().values():
        assert 'def main(argv: Sequence[str]' in path.read_text(encoding='utf-8'), f'{path.name} has no main(argv)'


def test_an_installed_folder_goes_before_a_checkouts(here):
    assert fqvit_cli.find_folder('tools') == here / 'tools'
    installed = here / 'fqvit_plugin' / '.mim' / 'tools'
    installed.mkdir(parents=True)
    assert fqvit_cli.find_folder('tools') == installed
    (here / 'pyproject.toml').unlink()
    with pytest.raises(fqvit_cli.UsageError, match=r'found no configs: .*install the wheel again'):
        fqvit_cli.find_folder('configs')


@pytest.mark.parametrize('status', [0, 3])
def test_status_name_and_neighbours(here, capsys, monkeypatch, status):
    monkeypatch.delitem(sys.modules, 'search', raising=False)  # other tests import the real tool by that name
    before = list(sys.path), list(sys.argv)
    assert fqvit_cli.main(['search', str(status)]) == status
    assert capsys.readouterr().out == 'fqvit search 42\n'
    assert (sys.path, sys.argv) == before
    assert 'search' not in sys.modules


def test_a_tools_own_usage_error_passes_through(here, capsys):
    with pytest.raises(SystemExit) as done:
        fqvit_cli.main(['search', 'much'])
    assert done.value.code == 2
    assert 'usage: fqvit search' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('argv', 'said'),
    [
        (['serach'], "no command 'serach'; did you mean search?"),
        (['se'], "no command 'se'; did you mean search or send?"),
        (['zzz'], "no command 'zzz'; there is: configs, doctor, search, send"),
        (['_shared'], "no command '_shared'"),
    ],
)
def test_unknown_commands(here, capsys, argv, said):
    assert fqvit_cli.main(argv) == 2
    assert said in capsys.readouterr().err


def test_a_tool_that_cannot_be_imported_names_the_doctor(here, capsys):
    (here / 'tools' / 'send.py').write_text('import no_such_module\n')
    assert fqvit_cli.main(['send']) == 2
    assert "No module named 'no_such_module'; `fqvit doctor` says what to install" in capsys.readouterr().err


def test_a_clear_beginning_will_do(here, capsys):
    assert fqvit_cli.main(['sea', '0']) == 0
    assert fqvit_cli.main(['sen']) == 0


def test_version_and_no_command(capsys):
    assert fqvit_cli.main(['--version']) == 0
    assert capsys.readouterr().out == f'fqvit_plugin {fq.__version__}\n'
    assert fqvit_cli.main([]) == 2
    assert 'commands' in capsys.readouterr().out


def test_configs(capsys):
    assert fqvit_cli.main(['configs']) == 0
    listed = capsys.readouterr().out.split()
    assert sorted(listed) == sorted(
        p.relative_to(ROOT / 'configs').with_suffix('').as_posix() for p in (ROOT / 'configs').rglob('*.py')
    )
    for name in ('fqvit_swin_t_w8a8.py', 'fqvit-swin-t-w8a8'):
        assert fqvit_cli.main(['configs', name]) == 0
        assert Path(capsys.readouterr().out.strip()) == ROOT / 'configs' / 'fqvit_swin_t_w8a8.py'
    assert fqvit_cli.main(['configs', 'digits_vit']) == 0
    assert Path(capsys.readouterr().out.strip()) == ROOT / 'configs' / 'digits' / 'digits_vit.py'
    assert fqvit_cli.main(['configs', 'fqvit_swin_t_w8a9']) == 2
    assert 'did you mean fqvit_swin_t_w8a8' in capsys.readouterr().err


def test_the_command_needs_nothing_but_python():
    """What is broken in an environment must not keep the command from saying so."""
    code = 'import sys, fqvit_cli; fqvit_cli.main(["--help"]); print(*sys.modules)'
    run = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert 'fqvit_cli.doctor' in loaded
    assert not loaded & {'torch', 'numpy', 'mmengine', 'mmpretrain', 'rich', 'fqvit_plugin'}


def test_a_missing_pkg_resources_is_said_before_a_tool_runs(here, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == 'pkg_resources' else find(name))
    assert fqvit_cli.main(['search', '0']) == 0
    assert "pip install 'setuptools>=66.1,<82'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ('version', 'bounds', 'kept'),
    [
        ('2.8.0+cpu', '>=2.1,<3', True),
        ('2.1', '>=2.1.0', True),
        ('2.10', '>=2.9', True),
        ('82.0', '>=66.1,<82', False),
        ('1.2.0', '==1.2.0', True),
        ('1.2', '==1.2.0', True),
        ('1.2.1', '==1.2.0', False),
        ('3.0rc1', '>=3.0', True),
        ('1.0', '!=1.0', False),
        ('anything1', '', True),
    ],
)
def test_bounds(version, bounds, kept):
    assert doctor.satisfies(version, bounds) is kept


def test_an_unreadable_bound_is_an_error():
    with pytest.raises(ValueError, match='cannot read the bound'):
        doctor.satisfies('1.0', '~=1.0')


def test_a_sound_environment_has_no_problem():
    assert doctor.problems(ASKED, SOUND.get) == []


@pytest.mark.parametrize(
    ('change', 'has_pkg_resources', 'what', 'remedy'),
    [
        ({'mmpretrain': None}, True, 'mmpretrain is not installed', "pip install 'mmpretrain==1.2.0'"),
        ({'torch': '2.0.1', 'numpy': '1.26.4'}, True, 'torch 2.0.1 is outside >=2.1', "pip install 'torch>=2.1'"),
        ({'torch': '2.2.2'}, True, 'torch 2.2.2 was built for NumPy 1', "pip install 'numpy<2'"),
        ({'mmcv': '2.1.0'}, True, 'mmcv 2.1.0 and mmcv-lite 2.2.0', 'pip uninstall -y mmcv mmcv-lite'),
        ({}, False, 'setuptools 81.0.0 has no pkg_resources', "pip install 'setuptools>=66.1,<82'"),
    ],
)
def test_problems(change, has_pkg_resources, what, remedy):
    ((said, advice),) = doctor.problems(ASKED, (SOUND | change).get, has_pkg_resources)
    assert said.startswith(what)
    assert advice.startswith(remedy)


def test_full_mmcv_will_do_instead_of_lite():
    assert doctor.problems(ASKED, (SOUND | {'mmcv-lite': None, 'mmcv': '2.1.0'}).get) == []


def test_the_requirements_we_state_can_be_read():
    text = (ROOT / 'pyproject.toml').read_text(encoding='utf-8').split('\ndependencies = [')[1].split('\n]')[0]
    asked = [line.strip().strip('",') for line in text.splitlines() if line.strip().startswith('"')]
    assert 'torch' in [doctor.split_requirement(line)[0] for line in asked]
    assert doctor.problems(asked) == []  # the environment that runs the tests is one that works


def test_doctor_says_what_python_says(capsys, monkeypatch):
    monkeypatch.setattr(doctor, 'requirements', lambda: ['torch>=2.1', 'no-such-distribution>=1'])
    monkeypatch.setattr(doctor, 'import_problem', lambda _: "ModuleNotFoundError: No module named 'timm'")
    assert fqvit_cli.main(['doctor']) == 1
    said = capsys.readouterr().out
    assert f'Python                {sys.version.split()[0]}' in said
    assert "pip install 'no-such-distribution>=1'" in said
    assert "No module named 'timm'" in said
    assert said.endswith('2 to mend\n')


def test_doctor_imports_in_a_process_of_its_own():
    assert doctor.import_problem('json') is None
    assert doctor.import_problem('no_such_module') == "ModuleNotFoundError: No module named 'no_such_module'"


def test_doctor_names_the_native_engine(capsys, monkeypatch):
    monkeypatch.setattr(doctor, 'import_problem', lambda _: None)
    fqvit_cli.main(['doctor'])
    said = capsys.readouterr().out
    assert 'native engine: ' in said
    assert ', compiled by /' in said or 'needs a C++ compiler' in said
