"""Hostile and damaged input: one typed error each, nothing executed, nothing written elsewhere, the model unchanged.

The cases are drawn from seeds, so that a failure can be run again by its number.
"""
import copy
import hashlib
import io
import json
import os
import pickle
import random
import struct
import zipfile
from collections import Counter

import pytest
import released
import safetensors.torch
import timm
import torch
from helpers import to_authors
from hub_helpers import cache_files

from elsa_models.hub import WeightsError, cache, load_weights
from elsa_models.hub.cache import CacheEntry
from elsa_models.hub.convert import check_folder, convert, save

ARCHITECTURE = released.NAME.partition('.')[0]
CASES = {'files': 200, 'entries': 125, 'pickles': 75, 'configs': 50, 'records': 75}  # of one part
MARK = 'ELSA_FUZZ_WAS_EXECUTED'


class Payload:
    """Runs when a reader that trusts pickles opens it."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args


class World:
    """What must not change: a model, the files around, and the environment."""

    def __init__(self, folder, weights):
        self.folder = folder
        self.model = copy.deepcopy(weights)
        self.state = {k: x.clone() for k, x in weights.state_dict().items()}
        self.inbox = folder / 'inbox'
        self.inbox.mkdir()
        (folder / 'secret').mkdir()
        (folder / 'secret' / 'model.safetensors').write_bytes(safetensors.torch.save(self.state))
        self.digests = self._digests()

    def _digests(self):
        return {
            str(p): hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(self.folder.rglob('*'))
            if p.is_file() and self.inbox not in p.parents}

    def is_unchanged(self):
        return all(torch.equal(x, self.state[k]) for k, x in self.model.state_dict().items())

    def check(self):
        assert self._digests() == self.digests
        assert MARK not in os.environ

    def try_loader(self, path, may_load=False):
        """Load the file into the model; return the state if it was taken."""
        try:
            load_weights(self.model, path)
        except WeightsError as e:
            assert len(str(e)) > 20
            assert self.is_unchanged()
            return None
        assert may_load, 'was taken'
        taken = {k: x.clone() for k, x in self.model.state_dict().items()}
        self.model.load_state_dict(self.state)
        return taken

    def try_converter(self, path):
        try:
            return convert(path, ARCHITECTURE, kind='weights')
        except WeightsError as e:
            assert len(str(e)) > 20


@pytest.fixture(scope='module')
def weights():
    torch.manual_seed(1)
    return timm.create_model(ARCHITECTURE, num_classes=3).eval()


@pytest.fixture
def world(tmp_path, weights):
    world = World(tmp_path, weights)
    yield world
    world.check()


@pytest.fixture(scope='module')
def originals(weights):
    """A file of each format, by its suffix."""
    state = weights.state_dict()
    out = {'.safetensors': safetensors.torch.save(state)}
    for suffix, content in {'.pth': state, '.pth.tar': dict(state_dict=to_authors(state), epoch=3)}.items():
        f = io.BytesIO()
        torch.save(content, f)
        out[suffix] = f.getvalue()
    f = io.BytesIO()
    torch.save(dict(state), f, _use_new_zipfile_serialization=False)
    out['.bin'] = f.getvalue()
    return out


_ran = Counter()  # cases, by kind and part


def _cases(kind, part):
    """Numbers of the cases of a part. Those that were begun are counted."""
    for case in range(part * CASES[kind], (part + 1) * CASES[kind]):
        _ran[kind, part] += 1
        yield case


PARTS = [0, *(pytest.param(i, marks=pytest.mark.slow) for i in range(1, 20))]


def _damage(rng, data):
    """Damage a file; return it and whether a reader has a chance to notice."""
    data = bytearray(data)
    kind = rng.choice(['cut', 'flip', 'flip_start', 'zero', 'swap', 'grow', 'noise', 'header', 'empty'])
    if kind == 'cut':
        data = data[:rng.randrange(len(data))]
    elif kind in ('flip', 'flip_start'):
        for _ in range(rng.choice([1, 1, 8])):
            data[rng.randrange(len(data) if kind == 'flip' else min(2000, len(data)))] ^= 1 << rng.randrange(8)
    elif kind == 'zero':
        start = rng.randrange(len(data))
        data[start:start + 500] = bytes(len(data[start:start + 500]))
    elif kind == 'swap':
        a, b = rng.randrange(len(data) - 64), rng.randrange(len(data) - 64)
        data[a:a + 64], data[b:b + 64] = data[b:b + 64], data[a:a + 64]
    elif kind == 'grow':
        data += rng.randbytes(rng.randrange(1, 100))
    elif kind == 'noise':
        data = bytearray(rng.randbytes(rng.randrange(1, 3000)))
    elif kind == 'header':
        length = rng.choice([2 ** 64 - 1, 2 ** 63, 2 ** 40, 100_000_001, 0, 1, len(data) * 2])
        data[:8] = struct.pack('<Q', length)
    else:
        data = bytearray()
    return bytes(data)


@pytest.mark.parametrize('part', PARTS)
def test_damaged_files(world, originals, part):
    """A file that is taken in spite of the damage differs in values alone; with a recorded sha256, none is taken."""
    entry = CacheEntry(world.inbox / 'entry')
    entry.folder.mkdir()
    taken = 0
    for case in _cases('files', part):
        rng = random.Random(f'files {case}')
        suffix = rng.choice(list(originals))
        data = _damage(rng, originals[suffix])
        path = world.inbox / f'x{suffix}'
        path.write_bytes(data)
        state = world.try_loader(path, may_load=True)
        taken += state is not None
        if case % 8 == 0:
            conversion = world.try_converter(path)
            assert (conversion is None) == (state is None)
        if data != originals[suffix]:
            record = cache.Record(hashlib.sha256(originals[suffix]).hexdigest(), len(originals[suffix]), 'x', 'x')
            (entry.folder / record.file).write_bytes(data)
            (entry.folder / cache.RECORD).write_text(json.dumps(record.__dict__))
            with pytest.raises(WeightsError):
                entry.find()
            (entry.folder / record.file).unlink()
    assert 0 < taken < .6 * CASES['files']


_DTYPES = [torch.int64, torch.int8, torch.bool, torch.complex64, torch.uint8, torch.float8_e4m3fn, torch.int32]


def _spoil(rng, state):
    """Spoil a right state dict in one of its entries, or in its structure."""
    state = dict(state)
    key = rng.choice(list(state))
    x = state[key]
    kind = rng.choice([
        'drop', 'add', 'rename', 'dtype', 'longer', 'shorter', 'deeper', 'scalar', 'empty', 'transpose', 'none', 'text',
        'nested', 'sparse', 'number_key', 'list', 'meta'])
    if kind == 'drop':
        del state[key]
    elif kind == 'add':
        state[key + rng.choice(['.weight', 'x', '.attn.rb', '\0', '/../../x'])] = x
    elif kind == 'rename':
        state[rng.choice(['', 'a', '../' + key, key.upper(), 'layers.99.' + key])] = state.pop(key)
    elif kind == 'dtype':
        state[key] = torch.zeros(x.shape).to(rng.choice(_DTYPES))
    elif kind == 'longer':
        state[key] = torch.zeros(x.shape[0] + rng.randrange(1, 4), *x.shape[1:])
    elif kind == 'shorter':
        state[key] = x[:-1] if x.shape[0] > 1 else x.new_zeros(0, *x.shape[1:])
    elif kind == 'deeper':
        state[key] = x[None]
    elif kind == 'scalar':
        state[key] = torch.tensor(0.)
    elif kind == 'empty':
        state[key] = torch.zeros(0)
    elif kind == 'transpose':
        is_square = x.dim() < 2 or x.shape[0] == x.shape[-1]
        state[key] = torch.zeros(1, 1, 1) if is_square else torch.zeros(*reversed(x.shape))
    elif kind == 'none':
        state[key] = None
    elif kind == 'text':
        state[key] = 'import os'
    elif kind == 'nested':
        state[key] = dict(state)
    elif kind == 'sparse':
        state[key] = torch.zeros(x.shape).to_sparse()
    elif kind == 'number_key':
        state[7] = x
    elif kind == 'meta':
        state[key] = torch.empty(x.shape, device='meta')
    else:
        return rng.choice([[x], 'text', 7, None, [], {}, (), dict(state_dict=None), dict(state_dict=[x]), dict(
            state_dict=dict(state_dict=state)), dict(model={}), dict(state_dict_ema={}), x, {key: x}])
    return state


@pytest.mark.parametrize('part', PARTS)
def test_wrong_entries(world, weights, part):
    """A file that is taken in spite of a wrong entry gives the right weights: nothing was made up, nothing cut."""
    ours = weights.state_dict()
    theirs = to_authors(ours)
    for case in _cases('entries', part):
        rng = random.Random(f'entries {case}')
        base = ours if rng.random() < .5 else theirs
        content = _spoil(rng, base)
        dropped = isinstance(content, dict) and {k for k in content if isinstance(k, str)} ^ base.keys()
        path = world.inbox / 'x.pth'
        if rng.random() < .3:
            content = dict(state_dict=content, epoch=1)
        torch.save(content, path)
        # what no reader looks at may be anything: saved buffers, and what ends like them
        free = any(k.endswith(('.relative_id', '.attn_mask')) for k in dropped or ()) or base is theirs
        taken = world.try_loader(path, may_load=free)
        assert taken is None or all(torch.equal(x, ours[k]) for k, x in taken.items()), (case, dropped)
        if case % 4 == 0:
            world.try_converter(path)


def _pickles(rng, originals):
    """A pickle with code in it, in one of the forms that checkpoints have had."""
    target = rng.choice([
        Payload(exec, f'import os; os.environ["{MARK}"] = "1"'), Payload(os.system, 'exit 3'),
        Payload(eval, f'__import__("os").environ.__setitem__("{MARK}", "1")'), Payload(os.putenv, MARK, '1'),
        Payload(__import__, 'antigravity'), Payload(getattr, 'x', 'upper'), Payload(open, '/dev/null', 'w'),
        Payload(torch.load, '/dev/null'), Payload(bytearray, 10 ** 13), Payload(list, range(10))])
    place = rng.choice(['bare', 'value', 'args', 'key', 'deep'])
    content = {
        'bare': target, 'value': {'norm.weight': target}, 'args': dict(state_dict={}, args=target),
        'key': {'a': {1: target}}, 'deep': dict(state_dict={'x': [({'y': target},)]})}[place]
    form = rng.choice(['zip', 'legacy', 'plain', 'spliced'])
    f = io.BytesIO()
    if form == 'plain':
        return pickle.dumps(content, protocol=rng.randrange(5))
    if form == 'spliced':  # into a file that is right
        with zipfile.ZipFile(io.BytesIO(originals['.pth'])) as old, zipfile.ZipFile(f, 'w') as new:
            for name in old.namelist():
                new.writestr(name, pickle.dumps(content, 2) if name.endswith('data.pkl') else old.read(name))
        return f.getvalue()
    torch.save(content, f, _use_new_zipfile_serialization=form == 'zip')
    return f.getvalue()


@pytest.mark.parametrize('part', PARTS)
def test_foreign_pickles(world, originals, part):
    for case in _cases('pickles', part):
        rng = random.Random(f'pickles {case}')
        path = world.inbox / rng.choice(['x.pth', 'x.pth.tar', 'x.bin', 'x.safetensors', 'x'])
        path.write_bytes(_pickles(rng, originals))
        assert world.try_loader(path) is None
        assert world.try_converter(path) is None
        assert MARK not in os.environ


_VALUES = [
    '../secret', '../secret/model.safetensors', '/etc/passwd', '../../../../etc/passwd', 'file:///etc/passwd',
    'http://127.0.0.1:9/x', '', 'os.system', '__import__("os")', -1, 0, 10 ** 9, 10 ** 30, 1e308, None, True, [],
    [10 ** 9], {}, {'a': 1}, 'elsa_swin_tiny', [[[]]], ['x'] * 100, 'hf-hub:a/b', 'local-dir:../secret',
    {'file': '../secret'}, 'torch.nn.LayerNorm', '\0', 'x' * 1000, 1.5]
_CFG_FIELDS = [
    'file', 'url', 'hf_hub_id', 'hf_hub_filename', 'source', 'state_dict', 'custom_load', 'architecture', 'tag',
    'input_size', 'num_classes', 'classifier', 'first_conv', 'label_offset', 'pool_size', 'fixed_input_size', 'strange']
_ARGS = [
    'img_size', 'depths', 'embed_dim', 'num_heads', 'kernel_size', 'norm_layer', 'device', 'dtype', 'weight_init',
    'strange', 'checkpoint_path', 'pretrained_cfg', 'pretrained_cfg_overlay', 'cache_dir', 'pretrained_strict',
    'features_only', 'filter_fn', 'kwargs_filter', 'pruned', 'model_cfg', 'feature_cls', 'scriptable', 'global_pool',
    'window_size', 'pretrained']
_TOP = ['architecture', 'num_classes', 'label_names', 'pretrained_cfg', 'model_args', 'x']


@pytest.mark.parametrize('part', PARTS)
def test_hostile_configs(world, originals, weights, tmp_path_factory, part, own_world):
    """timm reads config.json; what it makes of it reaches only the weights of the folder, or ends in an error.

    Errors of timm itself, before any of our code runs, may be of its own types.
    """
    folder = world.inbox / 'model'
    timm.models.save_for_hf(weights, folder, safe_serialization=True)
    good = json.loads((folder / 'config.json').read_text())
    (folder / 'README.md').write_text('import elsa_models')
    for case in _cases('configs', part):
        rng = random.Random(f'configs {case}')
        config = copy.deepcopy(good)
        value = rng.choice(_VALUES)
        kind = rng.choice(['cfg', 'cfg', 'args', 'args', 'top', 'whole', 'text'])
        if kind == 'cfg':
            config['pretrained_cfg'][rng.choice(_CFG_FIELDS)] = value
        elif kind == 'args':
            config.setdefault('model_args', {})[rng.choice(_ARGS)] = value
        elif kind == 'top':
            config[rng.choice(_TOP)] = value
        elif kind == 'whole':
            config = value
        text = json.dumps(config)
        if kind == 'text':
            text = text[:rng.randrange(len(text))]
        (folder / 'config.json').write_text(text)
        try:
            check_folder(folder)  # a WeightsError or nothing
            is_good = True
        except WeightsError:
            is_good = False
        try:
            model = timm.create_model(f'local-dir:{folder}', pretrained=True)
        except Exception as e:
            assert not is_good or not isinstance(e, WeightsError), (case, text)
            continue
        expected = weights.state_dict()
        for k, x in model.state_dict().items():  # the weights of this folder and no others
            if not k.startswith(('head.', 'patch_embed.proj')):
                assert torch.equal(x, expected[k]), (case, k)
    assert not cache_files(own_world)


@pytest.mark.parametrize('part', PARTS)
def test_hostile_records(world, originals, part):
    """A record in the cache cannot point anywhere else, nor be believed when it does not match its file."""
    data = originals['.safetensors']
    entry = CacheEntry(world.inbox / 'entry')
    entry.folder.mkdir()
    good = cache.Record(hashlib.sha256(data).hexdigest(), len(data), 'x', 'x')
    (entry.folder / good.file).write_bytes(data)
    for case in _cases('records', part):
        rng = random.Random(f'records {case}')
        fields = dict(good.__dict__)
        kind = rng.choice(['field', 'drop', 'whole', 'text', 'bytes'])
        if kind == 'field':
            fields[rng.choice(['sha256', 'size', 'strange'])] = rng.choice(_VALUES[:-2])
        elif kind == 'drop':
            del fields[rng.choice(list(fields))]
        text = json.dumps(rng.choice(_VALUES) if kind == 'whole' else fields)
        content = text[:rng.randrange(len(text))].encode() if kind == 'text' else text.encode()
        if kind == 'bytes':
            content = rng.randbytes(200)
        (entry.folder / cache.RECORD).write_bytes(content)
        with pytest.raises(WeightsError):
            entry.find()
    (entry.folder / cache.RECORD).write_text(json.dumps(good.__dict__))
    assert entry.find() == entry.folder / good.file


def test_the_payloads_would_run(tmp_path):
    """The pickles are armed: a reader that trusts them runs them."""
    path = tmp_path / 'x.pth'
    torch.save(Payload(exec, f'import os; os.environ["{MARK}"] = "1"'), path)
    try:
        torch.load(path, weights_only=False)
        assert os.environ.pop(MARK) == '1'
    finally:
        os.environ.pop(MARK, None)


def test_conversion_of_hostile_names_stays_in_its_folder(world, weights):
    path = world.folder / 'secret' / 'model.safetensors'
    folder = save(convert(path, ARCHITECTURE), world.inbox / 'out', path, name='../../x', tag='../y')
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']


def test_every_case_was_run():
    """Counts what the tests above have run: over 500 cases by default, over 10,000 with the slow ones."""
    if {kind for kind, _ in _ran} != CASES.keys():
        pytest.skip('not all of the tests above were run')
    assert all(n == CASES[kind] for (kind, _), n in _ran.items())
    parts = len({part for _, part in _ran})
    assert sum(_ran.values()) >= 500 * parts and len(PARTS) * 500 >= 10000
