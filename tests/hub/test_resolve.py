"""Where `pretrained=True` finds weights: the cache, a hub, Google Drive; and what it says when it does not."""
import json
import re
import sys

import pytest
import released
import safetensors.torch
import timm
import torch
from children import run_fresh_child
from hub_helpers import assert_right, cache_files, load, point_to

import elsa_models
from elsa_models.hub import WeightsError, cache, cache_root, cached_weights, load_weights
from elsa_models.models._checkpoint import fit_weights

SWINS = ['elsa_swin_base.damo_in1k', 'elsa_swin_small.damo_in1k', 'elsa_swin_tiny.damo_in1k']
DRIVE_IDS = {
    'tiny': '1eM0FsRNEDX-NncIEfvl4yXOAJawy2Ls0', 'small': '186PDbqrt2hEg8r5aH45D5D6bO-EWJgcO',
    'base': '1J42asBqLb6iiKaYQaeoS2UpT7kUSjBr9'}


# what has weights


def test_listings_tell_the_truth():
    assert timm.list_pretrained('elsa*') == SWINS
    assert not timm.list_models('*volo*', module='elsa_volo', pretrained=True)
    assert not timm.list_pretrained('test_elsa*')
    for size, file_id in DRIVE_IDS.items():
        for name in (f'elsa_swin_{size}', f'elsa_swin_{size}.damo_in1k'):
            cfg = timm.get_pretrained_cfg(name)
            assert cfg.tag == 'damo_in1k' and cfg.url == f'https://drive.google.com/uc?id={file_id}'
            assert cfg.hf_hub_id is None  # they are on no hub


@pytest.mark.parametrize('name', timm.list_models('elsa_volo*'))
def test_without_weights_the_error_says_so_and_names_the_warm_start(name):
    with pytest.raises(WeightsError, match='none were ever released') as e:
        load(name)
    source = str(e.value).partition('elsa_models.warm_start(model, \'')[2].partition('\'')[0]
    assert timm.is_model_pretrained(source)
    # it fits: all but the local attention is of the same name and shape
    own, other = (timm.create_model(n, device='meta').state_dict() for n in (name, source.partition('.')[0]))
    shared = [k for k in own if not re.match(r'network\.0\.\d+\.attn', k)]
    assert all(k in other and own[k].shape == other[k].shape for k in shared)


@pytest.mark.parametrize('name', ['test_elsa_swin', 'test_elsa_volo'])
def test_where_nothing_would_fit_nothing_is_advised(name):
    with pytest.raises(WeightsError, match='none were ever released. Use pretrained=False.$'):
        load(name)


@pytest.mark.parametrize('size', ['tiny', 'small', 'base'])
def test_a_swin_without_weights_names_its_relative(size):
    source = f'swin_{size}_patch4_window7_224.ms_in1k'
    with pytest.raises(WeightsError, match=f"warm_start\\(model, '{source}'\\)"):
        load(f'elsa_swin_{size}', pretrained_cfg_overlay=dict(url=None))
    assert timm.is_model_pretrained(source)


# the order


def test_by_name_from_the_hub(on_hub, on_drive, weights, image):
    model = load()
    assert_right(model, weights)
    assert torch.equal(model(image), weights(image))
    assert not on_drive.requests
    assert {path.rpartition('/')[2] for _, path, _ in on_hub.requests} == {'model.safetensors'}
    on_hub.requests.clear()
    assert_right(load('small_released'), weights)  # the tag is the default
    assert not on_hub.requests  # a cached weight needs no network


def test_from_the_authors_file(on_drive, weights, own_world, image):
    model = load()
    assert_right(model, weights)
    assert torch.equal(model(image), weights(image))
    assert [path.partition('?')[0] for _, path, _ in on_drive.requests] == ['/uc', '/download']
    files = cache_files(own_world)
    assert len(files) == 2 and files[1] == f'{released.NAME}/weights.json'  # and no checkpoint
    on_drive.requests.clear()
    assert_right(load(), weights)
    assert not on_drive.requests


def test_drive_serves_where_the_hub_does_not(hub, on_drive, weights):
    assert_right(load(), weights)
    assert hub.requests and on_drive.downloads == [None]


def test_overlays_come_first(on_hub, on_drive, weights, hub_files, tmp_path):
    load()
    on_hub.requests.clear()
    other = {k: x + 1 for k, x in weights.state_dict().items()}
    safetensors.torch.save_file(other, tmp_path / 'other.safetensors')
    for overlay in (dict(file=str(tmp_path / 'other.safetensors')), dict(state_dict=other)):
        model = load(pretrained_cfg_overlay=overlay)
        assert torch.equal(model.norm.weight, other['norm.weight'])
    assert not on_hub.requests and not on_drive.requests
    on_hub.commit('someone/else', {**hub_files, 'model.safetensors': safetensors.torch.save(other)})
    model = load(pretrained_cfg_overlay=dict(hf_hub_id='someone/else'))
    assert torch.equal(model.norm.weight, other['norm.weight'])


def test_given_weights_are_not_copied_into_the_cfg(weights):
    given = dict(weights.state_dict())
    model = load(pretrained_cfg_overlay=dict(state_dict=given))
    assert 'state_dict' not in model.pretrained_cfg and model.default_cfg is model.pretrained_cfg
    assert model.norm.weight.data_ptr() != given['norm.weight'].data_ptr()
    assert_right(model, weights)


def test_other_uses_of_weights(on_hub, weights, image):
    features = load(features_only=True)
    maps = timm.create_model('small_released', features_only=True).eval()
    maps.load_state_dict(features.state_dict())
    assert all(map(torch.equal, features(image), maps(image)))
    assert torch.equal(features.state_dict()['patch_embed.proj.weight'], weights.patch_embed.proj.weight)
    model = load(num_classes=3)
    assert torch.equal(model.forward_features(image), weights.forward_features(image)) and model(image).shape == (1, 3)
    assert load(num_classes=0)(image).shape == (1, 64)
    gray = load(in_chans=1)
    assert torch.allclose(gray.patch_embed.proj.weight, weights.patch_embed.proj.weight.sum(1, keepdim=True))
    assert load(img_size=(48, 64))(torch.zeros(1, 3, 48, 64)).shape == (1, 1000)


# hf-hub: names


def test_hf_hub_names(on_hub, weights, image):
    model = load(f'hf-hub:org/{released.NAME}')
    assert_right(model, weights)
    assert torch.equal(model(image), weights(image))
    assert model.pretrained_cfg['source'] == 'hf-hub' and model.pretrained_cfg['hf_hub_id'] == f'org/{released.NAME}'


def test_hf_hub_names_at_a_revision(on_hub, hub_files, weights):
    other = {k: x + 1 for k, x in weights.state_dict().items()}
    first = on_hub.repos[f'org/{released.NAME}']['branches']['main']
    on_hub.commit(f'org/{released.NAME}', {'model.safetensors': safetensors.torch.save(other)})
    on_hub.commit(f'org/{released.NAME}', hub_files, branch='v1')
    assert torch.equal(load(f'hf-hub:org/{released.NAME}').norm.weight, other['norm.weight'])
    for revision in ('v1', first):
        assert_right(load(f'hf-hub:org/{released.NAME}@{revision}'), weights)
        overlay = dict(hf_hub_id=f'org/{released.NAME}@{revision}')
        assert_right(load(pretrained_cfg_overlay=overlay), weights)
    with pytest.raises(WeightsError, match='nowhere.*RevisionNotFound|RevisionNotFound.*nowhere'):
        load(pretrained_cfg_overlay=dict(hf_hub_id=f'org/{released.NAME}@nowhere'))


def test_pickled_weights_on_a_hub(hub, hub_files, weights, tmp_path):
    torch.save(weights.state_dict(), tmp_path / 'pytorch_model.bin')
    hub.commit(f'org/{released.NAME}', {
        'config.json': hub_files['config.json'], 'pytorch_model.bin': (tmp_path / 'pytorch_model.bin').read_bytes()})
    assert_right(load(f'hf-hub:org/{released.NAME}'), weights)
    assert_right(load(), weights)
    assert_right(load(), weights)  # now from the cache, where it is no pickle


def test_private_repositories(on_hub, hub_files, weights, monkeypatch):
    on_hub.repos[f'org/{released.NAME}']['private'] = True
    with pytest.raises(WeightsError) as e:
        load()
    assert 'RepositoryNotFoundError' in str(e.value) and 'HF_TOKEN' in str(e.value)
    monkeypatch.setenv('HF_TOKEN', 'hf_wrong')
    with pytest.raises(WeightsError, match='HF_TOKEN'):
        load()
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    assert_right(load(), weights)


@pytest.mark.parametrize('changes', [
    dict(hf_hub_filename='../../../etc/passwd'), dict(hf_hub_filename='/etc/passwd'), dict(custom_load=True),
    dict(file='/etc/passwd', hf_hub_filename='absent.bin'), dict(custom_load='hf', hf_hub_filename='config.json')])
def test_a_config_on_a_hub_leads_nowhere_else(on_hub, hub_files, weights, own_world, changes):
    config = json.loads(hub_files['config.json'])
    config['pretrained_cfg'].update(changes)
    on_hub.commit(f'org/{released.NAME}', {'config.json': json.dumps(config).encode()})
    if changes == dict(custom_load=True):
        assert_right(load(f'hf-hub:org/{released.NAME}'), weights)
        return
    with pytest.raises(WeightsError):
        load(f'hf-hub:org/{released.NAME}')
    # old huggingface_hubs note in their cache what a repository does not have, by empty files
    assert not [p for p in own_world.rglob('passwd') if '.no_exist' not in p.parts]


# settings


def test_namespace(monkeypatch, on_hub, drive_server, weights, tmp_path):
    elsa_models.set_hub_namespace(None)
    assert elsa_models.get_hub_namespace() == ''
    monkeypatch.setenv('ELSA_HUB_NAMESPACE', 'org')
    assert elsa_models.get_hub_namespace() == 'org'
    assert_right(load(), weights)
    elsa_models.set_hub_namespace('')
    assert elsa_models.get_hub_namespace() == ''
    for wrong in ('a/b', '../x', 'a b'):
        with pytest.raises(ValueError, match='namespace: got'):
            elsa_models.set_hub_namespace(wrong)
    monkeypatch.setenv('ELSA_HUB_NAMESPACE', '../../etc')
    elsa_models.set_hub_namespace(None)
    with pytest.raises(WeightsError, match='HFValidationError'):
        load(cache_dir=tmp_path)


def test_places_of_the_cache(monkeypatch, own_world, tmp_path, on_hub, weights):
    assert cache_root() == own_world / 'elsa_models'
    monkeypatch.setenv('ELSA_CACHE', str(tmp_path / 'mine'))
    assert cache_root() == tmp_path / 'mine'
    load()
    assert (tmp_path / 'mine' / released.NAME / 'weights.json').is_file() and not cache_files(own_world)
    load(cache_dir=tmp_path / 'given')
    assert (tmp_path / 'given' / 'elsa_models' / released.NAME / 'weights.json').is_file()
    assert list((tmp_path / 'given').glob('models--org--*'))  # huggingface_hub's, as timm has it
    on_hub.requests.clear()
    assert_right(load(cache_dir=tmp_path / 'given'), weights)
    assert not on_hub.requests


def test_everything_by_environment_variables(on_hub, on_drive, tmp_path, hub_server):
    on_hub.repos[f'org/{released.NAME}']['private'] = True
    code = 'print(timm.create_model("small_released.authors", pretrained=True).norm.weight.sum().item())'
    env = dict(ELSA_HUB_NAMESPACE='org', HF_TOKEN='hf_right')
    out = run_fresh_child(code, tmp_path / 'elsewhere', hub=hub_server.url, **env)
    assert on_hub.requests and (tmp_path / 'elsewhere' / 'elsa_models' / released.NAME / 'weights.json').is_file()
    count = len(on_hub.requests)
    assert run_fresh_child(code, tmp_path / 'elsewhere', HF_HUB_OFFLINE='1') == out  # the cache alone
    assert len(on_hub.requests) == count and not on_drive.requests


# errors


def test_the_error_says_what_was_tried_why_it_failed_and_what_helps(hub, drive_server, monkeypatch):
    monkeypatch.setitem(sys.modules, 'gdown', None)
    with pytest.raises(WeightsError) as e:
        load()
    lines = str(e.value).splitlines()
    assert lines[0] == f'{released.NAME}: pretrained=True, but the weights could not be had. Tried:'
    assert lines[1].startswith('  the cache: nothing in ')
    assert lines[2].startswith(f'  the hub repository org/{released.NAME}: RepositoryNotFoundError: 401')
    assert lines[3] == f'  the authors\' file on Google Drive, {released.FILE_ID}: gdown is not installed'
    assert lines[4] == 'What helps:'
    assert lines[5].startswith('  hf auth login') and lines[6] == '  pip install \'.[hub]\' in a clone of elsa_models'
    assert f'https://drive.google.com/file/d/{released.FILE_ID}/view' in lines[7] and 'dict(file=\'PATH\')' in lines[7]
    assert len(lines) == 8


def test_without_a_namespace_no_hub_is_asked(hub_server, drive_server, monkeypatch):
    point_to(monkeypatch, hub_server.url)
    with pytest.raises(WeightsError, match='no namespace is set'):
        load()
    assert not hub_server.requests


def test_errors_of_explicit_repositories(on_hub):
    with pytest.raises(WeightsError, match='org/absent: the weights could not be had from the hub'):
        load(pretrained_cfg_overlay=dict(hf_hub_id='org/absent'))
    with pytest.raises(WeightsError, match='EntryNotFoundError'):
        load(pretrained_cfg_overlay=dict(hf_hub_id=f'org/{released.NAME}', hf_hub_filename='x.safetensors'))
    with pytest.raises(WeightsError):
        load(pretrained_cfg_overlay=dict(hf_hub_id='not an id'))


# integrity


@pytest.mark.parametrize('spoil', ['flip', 'cut', 'grow', 'remove', 'record', 'record_path', 'record_type'])
def test_damage_in_the_cache_is_noticed_on_every_load(on_hub, weights, own_world, spoil):
    load()
    folder = own_world / 'elsa_models' / released.NAME
    file, record = next(folder.glob('*.safetensors')), folder / 'weights.json'
    data = file.read_bytes()
    file.unlink()  # it may be linked to huggingface_hub's copy
    if spoil == 'flip':
        file.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
    elif spoil == 'cut':
        file.write_bytes(data[:-1])
    elif spoil == 'grow':
        file.write_bytes(data + b'\0')
    elif spoil.startswith('record'):
        file.write_bytes(data)
        fields = json.loads(record.read_text())
        fields['sha256'] = {'record': 7, 'record_path': '../' * 10 + 'etc/passwd', 'record_type': ['x']}[spoil]
        record.write_text(json.dumps(fields))
    assert 'ok' not in cached_weights()[released.NAME].split(',')
    on_hub.requests.clear()
    assert_right(load(), weights)
    assert on_hub.requests
    assert cached_weights()[released.NAME].startswith(f'ok, from org/{released.NAME}, sha256 ')


def test_damage_without_a_network_is_an_error(on_hub, own_world, monkeypatch):
    load()
    file = next((own_world / 'elsa_models').rglob('*.safetensors'))
    file.write_bytes(b'\0' * file.stat().st_size)  # this is huggingface_hub's copy as well
    point_to(monkeypatch, 'http://127.0.0.1:9')
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    with pytest.raises(WeightsError, match='is damaged, its sha256 is'):
        load()


def test_weights_that_do_not_fit_stay_out_of_the_cache(hub, drive_server, hub_files, own_world, weights, authors_file):
    wrong = {k: x for k, x in weights.state_dict().items() if k != 'norm.weight'}
    hub.commit(f'org/{released.NAME}', {**hub_files, 'model.safetensors': safetensors.torch.save(wrong)})
    drive_server.files[released.FILE_ID] = ('x', authors_file[:len(authors_file) // 2])
    with pytest.raises(WeightsError) as e:
        load()
    assert 'Missing (1): norm.weight' in str(e.value) and 'cannot be read' in str(e.value)
    assert not cache_files(own_world)
    hub.commit(f'org/{released.NAME}', hub_files)
    assert_right(load(), weights)


def test_load_weights_into_a_model(weights, authors_file, tmp_path, image):
    path = tmp_path / 'checkpoint.pth.tar'
    path.write_bytes(authors_file)
    model = timm.create_model('small_released').eval()
    load_weights(model, path)
    assert torch.equal(model(image), weights(image))
    before = {k: x.clone() for k, x in model.state_dict().items()}
    other = {k: x + 1 for k, x in weights.state_dict().items()}
    other['head.fc.bias'] = torch.zeros(3)
    torch.save(other, path)
    with pytest.raises(WeightsError, match=r'head.fc.bias has shape \(3,\) instead of \(1000,\)'):
        load_weights(model, path)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    with pytest.raises(TypeError, match='model: got Linear'):
        load_weights(torch.nn.Linear(2, 2), path)
    with pytest.raises(FileNotFoundError):
        load_weights(model, tmp_path / 'absent')


def test_warm_start_by_name_without_a_network(monkeypatch):
    model = timm.create_model('test_elsa_volo')
    before = {k: x.clone() for k, x in model.state_dict().items()}
    monkeypatch.setattr('huggingface_hub.constants.HF_HUB_OFFLINE', True)
    for name in ('test_vit.r160_in1k', 'hf-hub:timm/test_vit.r160_in1k'):
        with pytest.raises(WeightsError, match=f"^source: '{name}' could not be had.*unset HF_HUB_OFFLINE"):
            elsa_models.warm_start(model, name)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


# guards, each by itself


@pytest.mark.parametrize('spoil, words', [
    (lambda s: s.update({'norm.bias': torch.zeros(3)}), r'norm\.bias has shape \(3,\) instead of \(64,\)'),
    (lambda s: s.update({'norm.bias': torch.zeros(64, dtype=torch.int64)}), 'norm.bias is int64, strided, on cpu'),
    (lambda s: s.update({'norm.bias': torch.zeros(64).to_sparse()}), 'norm.bias is float32, sparse_coo, on cpu'),
    (lambda s: s.update({'norm.bias': torch.zeros(64, device='meta')}), 'norm.bias is float32, strided, on meta'),
    (lambda s: s.update({'norm.other': torch.zeros(64)}), r'does not fit ElsaSwin: norm\.other is unknown'),
    (lambda s: s.pop('norm.bias'), r'does not fit ElsaSwin: norm\.bias is missing'),
], ids=['shape', 'dtype', 'layout', 'device', 'unknown', 'missing'])
def test_what_does_not_fit_is_named(weights, spoil, words):
    state = dict(weights.state_dict())
    assert fit_weights(state, weights, None) == state
    spoil(state)
    with pytest.raises(WeightsError, match=words):
        fit_weights(state, weights, None)


def test_errors_of_filters_are_errors_about_weights(weights):
    with pytest.raises(WeightsError, match=r'does not fit ElsaSwin \(KeyError: \'x\'\)'):
        fit_weights({}, weights, lambda state, model: state['x'])


@pytest.mark.parametrize('args, words', [
    (dict(norm_layer='torch.nn.LayerNorm'), 'model_args names \'norm_layer\''),
    (dict(strange=1), 'model_args names \'strange\''),
    (dict(dtype='float16'), 'model_args names \'dtype\''),
    (dict(depths=[10 ** 9]), r'has depths = '),
    (dict(embed_dim={'a': 1}), 'has embed_dim = '),
    (dict(depths=[16384] * 4), r'has depths = .* 1024 blocks at most'),
    (dict(num_classes=7), r'has num_classes = \d+, but 7 in model_args'),
    (dict(depths=[1]), r'cannot be built from its config\.json and the arguments given \(ValueError: num_heads'),
])
def test_bad_arguments_in_a_config_json(hub_files, tmp_path, args, words):
    for name, data in hub_files.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads(hub_files['config.json'])
    config['model_args'] = {**config.get('model_args', {}), **args}
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=words):
        load(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('field, value', [
    ('mean', 'abc'), ('mean', [float('nan')] * 3), ('std', [0, 1, 1]), ('std', 1), ('std', [float('inf')] * 3),
    ('crop_pct', 'a'), ('crop_pct', -1), ('interpolation', 3), ('interpolation', 'cubic'), ('interpolation', ''),
    ('interpolation', 'random'),
    ('crop_mode', [1]), ('crop_mode', 'middle'), ('classifier', 5), ('first_conv', [1]), ('label_names', 3),
    ('num_classes', 'x'), ('num_classes', 7), ('test_input_size', [3]),
])
def test_config_json_that_cannot_be_right(hub_files, tmp_path, field, value):
    """One error that names the field, in place of a model at random or of predictions of nan %."""
    for name, data in hub_files.items():
        (tmp_path / name).write_bytes(data)
    config = json.loads(hub_files['config.json'])
    config['model_args'].pop('num_classes', None)
    (config if field in config else config['pretrained_cfg'])[field] = value
    (tmp_path / 'config.json').write_text(json.dumps(config))
    with pytest.raises(WeightsError, match=rf'config\.json: has {field} = '):
        load(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers(hub_files, weights, tmp_path, value):
    for name, data in hub_files.items():
        (tmp_path / name).write_bytes(data)
    state = {k: x.clone() for k, x in weights.state_dict().items()}
    state['norm.weight'][3] = value
    safetensors.torch.save_file(state, tmp_path / 'model.safetensors')
    with pytest.raises(WeightsError, match=r'norm\.weight holds NaN or inf'):
        load(f'local-dir:{tmp_path}')


@pytest.mark.parametrize('start', [b'<!DOCTYPE html><html><head><title>Google Drive', b'\n  <html>'])
def test_web_page_in_place_of_a_checkpoint(tmp_path, start):
    path = tmp_path / 'elsa_swin_tiny.pth.tar'
    path.write_bytes(start + b' - Virus scan warning</title></head></html>')
    with pytest.raises(WeightsError, match='is a web page'):
        load(pretrained_cfg_overlay=dict(file=str(path)))


def test_the_cache_is_asked_again_under_the_lock(on_drive, weights, monkeypatch):
    load()
    on_drive.requests.clear()
    find, asked = cache.CacheEntry.find, []

    def not_yet(self):  # another process fills the cache between the first look and the lock
        asked.append(self)
        return find(self) if len(asked) > 1 else None

    monkeypatch.setattr(cache.CacheEntry, 'find', not_yet)
    assert_right(load(), weights)
    assert not on_drive.requests and len(asked) == 2
