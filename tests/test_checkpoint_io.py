"""A checkpoint that MMEngine's CheckpointHook wrote loads and resumes, and no file gets code to
run.

Oracles: MMEngine's own runner (what it saved is what it gets back), ``torch.load`` without limits
on files written here, and files whose code would leave a trace if it ran.
"""

from __future__ import annotations

import os
import pickle
from collections import Counter, OrderedDict
from copy import deepcopy
from fractions import Fraction

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler
from mmengine.evaluator import BaseMetric
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseModel
from mmengine.registry import DefaultScope
from mmengine.runner import CheckpointLoader, Runner
from mmengine.utils import digit_version
from torch import nn

from fqvit_plugin.checkpoint_io import install_mmengine_loader, load_checkpoint

NEEDS_LOADER = digit_version(torch.__version__) >= digit_version('2.6.0')


# ---------------------------------------------------------------- MMEngine's runner


@pytest.fixture(scope='module', autouse=True)
def scope_restored():
    """A Runner leaves its registry scope behind for every test after it."""
    saved = DefaultScope._instance_dict.copy()
    yield
    DefaultScope._instance_dict.clear()
    DefaultScope._instance_dict.update(saved)


class TinyModel(BaseModel):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(2, 1)

    def forward(self, inputs, mode='tensor'):
        outputs = self.linear(torch.stack(inputs) if isinstance(inputs, list) else inputs)
        return {'loss': outputs.square().mean()} if mode == 'loss' else [outputs]


class Nothing(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results.append(1)

    def compute_metrics(self, results):
        return {'seen': len(results)}


def loader():
    data = [{'inputs': torch.tensor([float(i), 1.0])} for i in range(4)]
    sampler = DefaultSampler(data, shuffle=False)
    return torch.utils.data.DataLoader(data, batch_size=2, sampler=sampler)


def runner(work_dir, name, epochs=1, **kwargs):
    torch.manual_seed(len(name))
    return Runner(
        model=TinyModel(),
        work_dir=str(work_dir),
        train_dataloader=loader(),
        train_cfg={'by_epoch': True, 'max_epochs': epochs},
        optim_wrapper={'optimizer': {'type': 'SGD', 'lr': 0.1, 'momentum': 0.9}},
        param_scheduler={'type': 'MultiStepLR', 'milestones': [1], 'gamma': 0.5, 'end': 9},
        test_dataloader=loader(),
        test_cfg={},
        test_evaluator=Nothing(),
        default_hooks={'logger': {'type': 'LoggerHook', 'interval': 1}},
        log_level='ERROR',
        experiment_name=name,
        **kwargs,
    )


@pytest.fixture
def loader_restored():
    """MMEngine's own local loader during the test, whoever replaced it before, and after it."""
    schemes = CheckpointLoader._schemes
    found = schemes['']
    from mmengine.runner import checkpoint

    CheckpointLoader.register_scheme('', loader=checkpoint.load_from_local, force=True)
    yield
    CheckpointLoader.register_scheme('', loader=found, force=True)


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """One epoch of two iterations: the runner, the file its hook wrote, the weights before."""
    folder = tmp_path_factory.mktemp('trained')
    run = runner(folder, 'trained')
    first = deepcopy(run.model.state_dict())
    run.train()
    return run, folder / 'epoch_1.pth', first


def fresh_name(request):
    return request.node.name.replace('[', '_').replace(']', '_')


@pytest.mark.skipif(not NEEDS_LOADER, reason='before torch 2.6 MMEngine reads its own checkpoints')
def test_without_the_loader_mmengine_refuses_its_own_file(trained, loader_restored):
    with pytest.raises(pickle.UnpicklingError, match='HistoryBuffer'):
        CheckpointLoader.load_checkpoint(str(trained[1]), map_location='cpu')


def test_runner_tests_what_it_trained(trained, tmp_path, request, loader_restored):
    install_mmengine_loader()
    source, path, _ = trained
    run = runner(tmp_path, fresh_name(request), load_from=str(path))
    before = run.model.linear.weight.clone()
    assert run.test() == {'seen': 2}
    assert torch.equal(run.model.linear.weight, source.model.linear.weight)
    assert not torch.equal(run.model.linear.weight, before)


def test_runner_resumes_what_it_trained(trained, tmp_path, request, loader_restored):
    install_mmengine_loader()
    source, path, _ = trained
    run = runner(tmp_path, fresh_name(request), epochs=2, resume=True, load_from=str(path))
    run.train()
    assert (run.epoch, run.iter) == (2, 4)
    # the learning rate went on from the saved schedule, momentum and loss history from the file
    assert run.optim_wrapper.get_lr()['lr'] == [0.05]
    assert len(run.optim_wrapper.optimizer.state) == 2
    history = run.message_hub.get_scalar('train/loss')
    first = source.message_hub.get_scalar('train/loss').data
    assert isinstance(history, HistoryBuffer)
    assert len(history.data[0]) == 4
    np.testing.assert_array_equal(history.data[0][:2], first[0])
    np.testing.assert_array_equal(history.data[1][:2], first[1])
    assert history.mean() == pytest.approx(history.data[0].mean())


def test_resumed_training_equals_uninterrupted(trained, tmp_path, request, loader_restored):
    install_mmengine_loader()
    _, path, first = trained
    whole = runner(tmp_path / 'whole', fresh_name(request) + '_whole', epochs=2)
    whole.model.load_state_dict(first)
    whole.train()
    name = fresh_name(request) + '_resumed'
    resumed = runner(tmp_path / 'resumed', name, epochs=2, resume=True, load_from=str(path))
    resumed.train()
    torch.testing.assert_close(resumed.model.linear.weight, whole.model.linear.weight, rtol=0, atol=0)


def test_content_equals_an_unlimited_load(trained):
    # the file is ours, so it may run what it likes here
    expected = torch.load(trained[1], map_location='cpu', weights_only=False)
    loaded = load_checkpoint(trained[1])
    assert loaded.keys() == expected.keys()
    assert loaded['state_dict'].keys() == expected['state_dict'].keys()
    for name, tensor in expected['state_dict'].items():
        assert torch.equal(loaded['state_dict'][name], tensor)
    assert loaded['state_dict']._metadata == expected['state_dict']._metadata
    assert loaded['meta'] == expected['meta']
    assert loaded['param_schedulers'] == expected['param_schedulers']
    hub, reference = loaded['message_hub'], expected['message_hub']
    assert hub['resumed_keys'] == reference['resumed_keys']
    assert hub['runtime_info'].keys() == reference['runtime_info'].keys()
    for name, buffer in reference['log_scalars'].items():
        np.testing.assert_array_equal(hub['log_scalars'][name].data, buffer.data)
        assert hub['log_scalars'][name].max_length == buffer.max_length


def test_install_twice_is_once(loader_restored):
    install_mmengine_loader()
    once = dict(CheckpointLoader._schemes)
    install_mmengine_loader()
    assert dict(CheckpointLoader._schemes) == once
    assert list(CheckpointLoader._schemes)[-1] == ''  # still the last resort, after http and s3


@pytest.mark.parametrize(('version', 'replaced'), [('2.1.2', False), ('2.6.0+cpu', True)])
def test_only_torch_2_6_and_later_needs_it(monkeypatch, loader_restored, version, replaced):
    before = CheckpointLoader._schemes['']
    monkeypatch.setattr(torch, '__version__', version)
    install_mmengine_loader()
    assert (CheckpointLoader._schemes[''] is not before) is replaced


# ---------------------------------------------------------------- no code runs


class Trap:
    """Unpickled without limits, it calls ``function(*args)``."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


def write(path, content, legacy=False):
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    return path


@pytest.mark.parametrize('legacy', [False, True])
def test_code_in_a_file_does_not_run(tmp_path, legacy, caplog):
    mark = tmp_path / 'mark'
    weights = {'w': torch.arange(3.0)}
    trap = Trap(os.mkdir, str(mark))
    path = write(tmp_path / 'a.pth', {'state_dict': weights, 'meta': {'x': trap, 'n': 1}}, legacy)
    loaded = load_checkpoint(path)
    assert not mark.exists()
    assert torch.equal(loaded['state_dict']['w'], weights['w'])
    assert loaded['meta'] == {'n': 1}
    assert 'meta.x (' + os.mkdir.__module__ + '.mkdir)' in caplog.text
    torch.load(path, weights_only=False)
    assert mark.exists(), 'the trap must be able to snap'


def test_code_in_a_bare_pickle_does_not_run(tmp_path):
    mark = tmp_path / 'mark'
    for protocol in range(6):
        path = tmp_path / f'{protocol}.pth'
        path.write_bytes(pickle.dumps({'a': Trap(os.mkdir, str(mark))}, protocol))
        with pytest.raises(ValueError, match='not a readable checkpoint'):
            load_checkpoint(path)
    assert not mark.exists()


def test_getattr_reaches_nothing(tmp_path, caplog):
    # HistoryBuffer files name getattr, which could fetch any attribute of any class
    trap = Trap(getattr, HistoryBuffer, 'register_statistics')
    loaded = load_checkpoint(write(tmp_path / 'a.pth', {'state_dict': {}, 'x': trap}))
    assert loaded == {'state_dict': {}}
    assert 'getattr' in caplog.text


def test_codecs_other_than_latin1_are_refused(tmp_path):
    import _codecs

    content = {'a': Trap(_codecs.encode, 'a', 'rot13'), 'b': Fraction(1, 2)}
    with pytest.raises(ValueError, match="bytes in encoding 'rot13'"):
        load_checkpoint(write(tmp_path / 'a.pth', content))


def test_attributes_cannot_be_written_onto_torch(tmp_path):
    # push the function, then BUILD with the state (None, {'mark': 1}): setattr(function, 'mark', 1)
    stream = b'ctorch._utils\n_rebuild_tensor_v2\n(N}Vmark\nI1\nstb.'
    assert pickle.loads(stream) is torch._utils._rebuild_tensor_v2
    assert vars(torch._utils._rebuild_tensor_v2).pop('mark') == 1
    (tmp_path / 'a.pth').write_bytes(stream)
    with pytest.raises(ValueError, match='not a readable checkpoint'):
        load_checkpoint(tmp_path / 'a.pth')
    assert not hasattr(torch._utils._rebuild_tensor_v2, 'mark')


def test_a_file_cannot_change_the_statistics_of_every_buffer(tmp_path):
    buffer = HistoryBuffer([1.0, 3.0], [1, 1])
    before = dict(HistoryBuffer._statistics_methods)
    hub = {'log_scalars': {'loss': buffer}, 'runtime_info': {}, 'resumed_keys': {'loss': True}}
    buffer._statistics_methods = {'mean': max, **before}  # an instance attribute: only in the file
    path = write(tmp_path / 'a.pth', {'state_dict': {}, 'message_hub': hub})
    loaded = load_checkpoint(path)['message_hub']['log_scalars']['loss']
    assert HistoryBuffer._statistics_methods == before
    assert loaded.statistics('mean') == 2.0


# ---------------------------------------------------------------- what is kept, what is refused


@pytest.mark.parametrize('legacy', [False, True])
def test_plain_data_survives_next_to_a_foreign_object(tmp_path, legacy):
    plain = {
        'float64': np.float64(0.5),
        'array': np.arange(6, dtype=np.int16).reshape(2, 3),
        'text': np.array(['a', 'bc']),
        'set': {1, 2},
        'complex': 1 + 2j,
        'bytes': b'\x00\xff',
        'size': torch.Size([2, 3]),
        'dtype': torch.bfloat16,
        'device': torch.device('cpu'),
        'half': torch.ones(2).half(),
        'parameter': nn.Parameter(torch.ones(2)),
        'counter': Counter('aab'),
        'bytearray': bytearray(b'a'),
        'ordered': OrderedDict(b=1, a=[1, (2, None)]),
    }
    content = {'plain': plain, 'foreign': Fraction(1, 2), 'list': [Fraction(1, 2), 1]}
    loaded = load_checkpoint(write(tmp_path / 'a.pth', content, legacy))
    assert loaded.keys() == {'plain'}
    for name, value in plain.items():
        found = loaded['plain'][name]
        assert type(found) is type(value), name
        if isinstance(value, np.ndarray | torch.Tensor):
            assert found.dtype == value.dtype
            assert (found == value).all()
        else:
            assert found == value


def test_a_tensor_in_two_places_stays_one(tmp_path):
    shared = torch.zeros(3)
    content = {'state_dict': {'a': shared, 'b': shared[1:]}, 'foreign': Fraction(1, 2)}
    loaded = load_checkpoint(write(tmp_path / 'a.pth', content))['state_dict']
    loaded['a'][1] = 5
    assert loaded['b'][0] == 5


@pytest.mark.parametrize('entry', ['state_dict', 'model', 'state_dict_ema'])
def test_a_foreign_object_among_the_weights_is_an_error(tmp_path, entry):
    content = {entry: {'w': torch.zeros(1), 'v': Fraction(1, 2)}}
    with pytest.raises(ValueError, match=rf'among the weights .*{entry}\.v \(fractions\.Fraction'):
        load_checkpoint(write(tmp_path / 'a.pth', content))


def test_a_pickled_model_is_an_error(tmp_path):
    with pytest.raises(ValueError, match=r'a pickled .*Linear; save and give its state_dict'):
        load_checkpoint(write(tmp_path / 'a.pth', nn.Linear(2, 2)))
    with pytest.raises(ValueError, match=r'among the weights .*model \(torch\.nn.*Linear\)'):
        load_checkpoint(write(tmp_path / 'b.pth', {'model': nn.Linear(2, 2)}))


@pytest.mark.filterwarnings('ignore:.*torch.jit')  # deprecated, and still about
def test_a_torchscript_archive_is_an_error(tmp_path):
    torch.jit.save(torch.jit.trace(nn.ReLU(), torch.zeros(1)), tmp_path / 'a.pth')
    with (
        pytest.warns(UserWarning, match='TorchScript archive'),
        # before torch 2.6 torch.load hands such a file to torch.jit
        pytest.raises(ValueError, match=r'not a readable checkpoint|holds a RecursiveScriptModule'),
    ):
        load_checkpoint(tmp_path / 'a.pth')


def test_a_list_is_no_checkpoint(tmp_path):
    with pytest.raises(ValueError, match='holds a list; give a saved state dict'):
        load_checkpoint(write(tmp_path / 'a.pth', [torch.zeros(1)]))


@pytest.mark.parametrize('legacy', [False, True])
@pytest.mark.parametrize('share', [0.02, 0.3, 0.9])
def test_a_truncated_training_checkpoint_is_an_error(tmp_path, trained, legacy, share):
    path = trained[1]
    if legacy:
        content = torch.load(path, weights_only=False)
        path = write(tmp_path / 'legacy.pth', content, legacy=True)
    data = path.read_bytes()
    (tmp_path / 'cut.pth').write_bytes(data[: int(len(data) * share)])
    with pytest.raises(ValueError, match=r'cut\.pth is not a readable checkpoint: it is truncated'):
        load_checkpoint(tmp_path / 'cut.pth')


def test_missing_file_and_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match=r'none\.pth can not be found'):
        load_checkpoint(tmp_path / 'none.pth')
    with pytest.raises(FileNotFoundError, match='is a folder'):
        load_checkpoint(tmp_path)


def test_a_damaged_history_is_left_out(tmp_path, caplog):
    buffer = HistoryBuffer([1.0], [1])
    buffer._count_history = np.zeros(3)
    hub = {'log_scalars': {'loss': buffer}, 'runtime_info': {'iter': 1}, 'resumed_keys': {}}
    loaded = load_checkpoint(write(tmp_path / 'a.pth', {'state_dict': {}, 'message_hub': hub}))
    assert loaded['message_hub']['log_scalars'] == {}
    assert loaded['message_hub']['runtime_info'] == {'iter': 1}
    assert 'message_hub.log_scalars.loss' in caplog.text
