"""tools/calibrate.py: writes what the hook would, and turns a user's mistakes into one line."""

from __future__ import annotations

import calibrate
import pytest
import torch

import fqvit_plugin as fq

from .projects import float_checkpoint, project, runner, write_images


@pytest.fixture(scope='module')
def job(tmp_path_factory):
    root = tmp_path_factory.mktemp('job')
    images = write_images(root / 'images', {'train': 4, 'val': 1})
    cfg = project(images, root / 'work', 'swin')
    float_checkpoint(cfg, root / 'float.pth')
    cfg.dump(root / 'config.py')
    return cfg, str(root / 'config.py'), str(root / 'float.pth')


def test_writes_the_checkpoint_the_hook_writes(job, tmp_path, capsys):
    cfg, config, weights = job
    out = tmp_path / 'deep' / 'q.pth'
    assert calibrate.main([config, weights, '--out', str(out), '--batches', '3']) == 0
    printed = capsys.readouterr().out
    assert 'calibrated on 12 images' in printed
    assert 'QIntSoftmax' in printed
    runner(cfg).test()
    ours = torch.load(out, weights_only=True)
    hooks = torch.load(f'{cfg.work_dir}/calibrated.pth', weights_only=True)
    assert ours['meta']['fqvit'] == hooks['meta']['fqvit']
    assert ours['meta']['dataset_meta'] == hooks['meta']['dataset_meta']
    assert ours['state_dict'].keys() == hooks['state_dict'].keys()
    assert all(torch.equal(v, hooks['state_dict'][k]) for k, v in ours['state_dict'].items())


def test_options_reach_the_scheme_and_the_batches(job, tmp_path):
    _, config, weights = job
    out = tmp_path / 'q.pth'
    options = ['--observer', 'omse', '--preset', 'reference', '--weight-bits', '4', '--act-bits', '6']
    batches = ['--batches', '2', '--cfg-options', 'calib_dataloader.batch_size=3']
    assert calibrate.main([config, weights, '--out', str(out), '--scheme', 'fqvit_w8a8', *options, *batches]) == 0
    info = torch.load(out, weights_only=True)['meta']['fqvit']
    expected = fq.get_scheme('fqvit_w8a8', observer='omse', preset='reference', weight_bits=4, act_bits=6)
    assert fq.QuantScheme.from_dict(info['scheme']) == expected
    assert len(info['images']) == 6


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(config='nowhere.py'), 'there is no config nowhere.py'),
        (dict(checkpoint='nowhere.pth'), 'nowhere.pth'),
        (dict(options=['--observer', 'maxmin']), "unknown observer 'maxmin'"),
        (dict(options=['--act-bits', '17']), 'bits must be a whole number from 2 to 16, got 17'),
        (dict(options=['--batches', '0']), 'num_batches must be at least 1'),
        (
            dict(options=['--cfg-options', 'calib_dataloader.dataset.data_root=gone']),
            'calib_dataloader cannot be built',
        ),
    ],
)
def test_mistakes_give_one_line_and_exit_code_2(job, tmp_path, capsys, change, message):
    _, config, weights = job
    out = tmp_path / 'q.pth'
    argv = [change.get('config', config), change.get('checkpoint', weights), '--out', str(out)]
    assert calibrate.main([*argv, *change.get('options', [])]) == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith('calibrate.py: ')
    assert message in last
    assert not out.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason='a GPU is here')
def test_a_gpu_that_is_not_there(job, tmp_path, capsys):
    _, config, weights = job
    assert calibrate.main([config, weights, '--out', str(tmp_path / 'q.pth'), '--device', 'cuda']) == 2
    assert 'sees no GPU' in capsys.readouterr().err


def test_an_existing_file_is_kept_unless_forced(job, tmp_path, capsys):
    _, config, weights = job
    out = tmp_path / 'q.pth'
    out.write_text('precious')
    argv = [config, weights, '--out', str(out), '--batches', '1']
    assert calibrate.main(argv) == 2
    assert '--force' in capsys.readouterr().err
    assert out.read_text() == 'precious'
    assert calibrate.main([*argv, '--force']) == 0
    assert 'fqvit' in torch.load(out, weights_only=True)['meta']


def test_ctrl_c_keeps_the_old_file(job, tmp_path, monkeypatch, capsys):
    _, config, weights = job
    out = tmp_path / 'q.pth'
    out.write_text('precious')

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, 'save', interrupt)
    assert calibrate.main([config, weights, '--out', str(out), '--batches', '1', '--force']) == 130
    assert 'interrupted' in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ['q.pth']
    assert out.read_text() == 'precious'


def test_a_checkpoint_that_is_no_checkpoint(job, tmp_path, capsys):
    _, config, _ = job
    text = tmp_path / 'a.pth'
    text.write_text('<html>')
    assert calibrate.main([config, str(text), '--out', str(tmp_path / 'q.pth')]) == 2
    assert 'web page' in capsys.readouterr().err


def test_help_has_examples(capsys):
    with pytest.raises(SystemExit) as done:
        calibrate.main(['--help'])
    assert done.value.code == 0
    assert 'examples:' in capsys.readouterr().out
