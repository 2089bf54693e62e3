"""Conversion of every kind of checkpoint, what the folder holds, and the way to a hub and back."""
import argparse
import hashlib
import json
import os
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import released
import resnet_records
import safetensors.torch
import timm
import torch
from children import run_child
from helpers import DATA, keyed_input, keyed_state_dict, max_error, to_authors
from hub_helpers import assert_right, load
from timm.models.swin_transformer import SwinTransformer
from timm.models.volo import VOLO

from elsa_models.hub import OutputError, WeightsError
from elsa_models.hub.convert import check_folder, convert, save
from elsa_models.hub.publish import publish
from elsa_models.inspect import count_macs

SCRIPTS = Path(__file__).parents[2] / 'scripts'
ARCHITECTURE = released.NAME.partition('.')[0]


def _write(path, state_dict, **others):
    torch.save(dict(
        epoch=299, arch='x', state_dict=state_dict, version=2, metric=82.7,
        optimizer=dict(state={0: dict(step=3, exp_avg=torch.zeros(2))}, param_groups=[dict(lr=1e-3, params=[0])]),
        args=argparse.Namespace(model='x', lr=1e-3), amp_scaler=dict(scale=65536.), **others), path)
    return path


def _detector(weights, image_head='roi_head.bbox_head.fc.weight'):
    """Weights as inside the authors' detectors: a prefix, four norms of the outputs, and other parts."""
    out = OrderedDict()
    for k, x in to_authors(weights.state_dict()).items():
        if k.startswith('norm.'):
            out[f'backbone.norm3.{k[5:]}'] = x
        elif not k.startswith('head.'):
            out[f'backbone.{k}'] = x
    for i, dim in enumerate((8, 16, 32)):
        out[f'backbone.norm{i}.weight'], out[f'backbone.norm{i}.bias'] = torch.ones(dim), torch.zeros(dim)
    out['neck.fpn_convs.0.conv.weight'] = torch.zeros(4, 4, 3, 3)
    out[image_head] = torch.zeros(2, 2)
    return out


# the authors' classifiers


def test_keyed_checkpoint_gives_the_reference_logits(tmp_path):
    others = {'module.norm.weight': torch.zeros(768)}  # to be passed over
    path = _write(tmp_path / 'elsa_swin_tiny.pth.tar', others, state_dict_ema=keyed_state_dict('tiny'))
    conversion = convert(path, 'elsa_swin_tiny')
    folder = save(conversion, tmp_path / 'out', path, tag='damo_in1k')
    path.unlink()
    assert sorted(p.name for p in folder.iterdir()) == ['README.md', 'config.json', 'model.safetensors']
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval().double()
    logits = torch.from_numpy(np.load(DATA / 'elsa_swin_tiny_keyed.npz')['logits'])
    with torch.no_grad():
        assert max_error(model(keyed_input()[:1].double()), logits[:1]) <= 1e-9
    card = (folder / 'README.md').read_text()
    assert '29,140,978' in card and '| 4.77 |' in card and 'license: mit' in card and '2112.12786' in card
    assert '82.7' not in card and 'No accuracy is stated' in card


def test_pretrained_true_gives_the_reference_logits(drive_server, tmp_path):
    path = _write(tmp_path / 'x', keyed_state_dict('tiny'))
    drive_server.files['1eM0FsRNEDX-NncIEfvl4yXOAJawy2Ls0'] = ('elsa_swin_tiny.pth.tar', path.read_bytes())
    path.unlink()
    model = load('elsa_swin_tiny').double()
    logits = torch.from_numpy(np.load(DATA / 'elsa_swin_tiny_keyed.npz')['logits'])
    with torch.no_grad():
        assert max_error(model(keyed_input()[:1].double()), logits[:1]) <= 1e-9


def test_averaged_weights_are_taken_unless_told_otherwise(tmp_path, weights):
    plain = {k: x + 1 for k, x in to_authors(weights.state_dict()).items()}
    path = _write(tmp_path / 'x', plain, state_dict_ema=to_authors(weights.state_dict()))
    assert_right(convert(path, ARCHITECTURE).model, weights)
    assert torch.equal(convert(path, ARCHITECTURE, use_ema=False).model.norm.weight, weights.norm.weight + 1)


def test_report_of_every_key(tmp_path, weights):
    theirs = to_authors(weights.state_dict())
    report = convert(_write(tmp_path / 'x', theirs), ARCHITECTURE).report
    rows = {source: (targets, actions) for source, targets, actions in report.rows}
    assert rows.keys() == theirs.keys()
    reached = [t for targets, _ in rows.values() for t in targets]
    assert sorted(reached) == sorted(weights.state_dict())
    assert rows['norm.weight'] == (('norm.weight',), ('same',))
    assert rows['head.bias'] == (('head.fc.bias',), ('renamed',))
    assert rows['layers.0.downsample.norm.bias'] == (('layers.1.downsample.norm.bias',), ('renamed',))
    name = 'layers.0.blocks.0.attn.'
    assert rows[name + 'ghost_head'] == ((name + 'ghost_add',), ('renamed', 'reshaped'))
    assert rows[name + 'pre_proj.weight'] == ((name + 'qkv.weight',), ('renamed', 'reshaped'))
    name = 'layers.3.blocks.1.attn.'
    assert rows[name + 'pre_proj.weight'] == ((name + 'qkv.weight',), ('renamed', 'reordered'))
    assert rows[name + 'rb'] == ((name + 'relative_position_bias_table',), ('renamed', 'transposed'))
    assert rows[name + 'relative_id'] == ((), ('dropped',))
    assert report.count('missing') == 0 and f'{len(theirs)} entries: ' in str(report) and '2 dropped' in str(report)


def test_both_ghost_matrices_are_reported_as_split(tmp_path):
    model = timm.create_model(ARCHITECTURE, lam=1)
    path = _write(tmp_path / 'x', to_authors(model.state_dict()))
    conversion = convert(path, ARCHITECTURE, model_args=dict(lam=1))
    assert_right(conversion.model, model)
    assert conversion.report.count('split') == 3
    folder = save(conversion, tmp_path / 'out', path)
    assert_right(timm.create_model(f'local-dir:{folder}', pretrained=True), model)


def test_authors_whose_classifier_has_another_name(tmp_path):
    weights = resnet_records.keyed_state_dict('axial26s')
    assert 'fc.weight' in weights
    conversion = convert(_write(tmp_path / 'x', weights), 'axial_resnet26s')
    assert conversion.model.num_classes == 1000
    assert torch.equal(conversion.model.head.fc.bias, weights['fc.bias'].float())


# other sources


@pytest.mark.parametrize('head', ['roi_head.bbox_head.fc.weight', 'decode_head.conv_seg.weight'])
def test_backbone_of_a_detector(tmp_path, weights, image, head):
    path = tmp_path / 'detector.pth'
    torch.save(dict(
        meta=dict(epoch=12, config='model = dict()', CLASSES=('person', 'car')), state_dict=_detector(weights, head),
        optimizer=dict(state={}, param_groups=[])), path)
    conversion = convert(path, ARCHITECTURE)
    assert conversion.kind == 'backbone'
    rows = {source: (targets, actions) for source, targets, actions in conversion.report.rows}
    assert rows['backbone.norm3.weight'] == (('norm.weight',), ('renamed',))
    assert rows['backbone.norm0.weight'] == rows['neck.fpn_convs.0.conv.weight'] == rows[head] == ((), ('dropped',))
    folder = save(conversion, tmp_path / 'out', path)
    model = timm.create_model(f'local-dir:{folder}', pretrained=True).eval()
    assert torch.equal(model.forward_features(image), weights.forward_features(image))
    assert model(image).shape == (1, 64)
    assert 'image-feature-extraction' in (folder / 'README.md').read_text()
    maps = timm.create_model(f'local-dir:{folder}', pretrained=True, features_only=True)(torch.zeros(1, 3, 32, 32))
    assert [m.shape[-1] for m in maps] == [8, 16, 32, 64]


@pytest.mark.parametrize('wrap', [dict, lambda s: dict(state_dict=s), lambda s: dict(model=s), lambda s: {
    f'_orig_mod.module.{k}': x for k, x in s.items()}])
def test_own_training_checkpoints(tmp_path, wrap):
    model = timm.create_model(ARCHITECTURE, num_classes=7)
    torch.save(wrap(dict(model.state_dict())), tmp_path / 'last.pth.tar')
    conversion = convert(tmp_path / 'last.pth.tar', ARCHITECTURE)
    assert_right(conversion.model, model)
    assert conversion.report.count('same') == len(conversion.report.rows)
    folder = save(conversion, tmp_path / 'out', tmp_path / 'last.pth.tar')
    assert_right(timm.create_model(f'local-dir:{folder}', pretrained=True), model)
    assert json.loads((folder / 'config.json').read_text())['num_classes'] == 7


@pytest.mark.parametrize('architecture, relative, kwargs', [
    ('test_elsa_swin', 'swin', dict(
        img_size=64, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=2)),
    ('test_elsa_volo', 'volo', dict(
        img_size=64, patch_size=4, stem_hidden_dim=16, layers=(2, 1, 2, 1), embed_dims=(48, 96, 96, 96),
        num_heads=(3, 6, 6, 6))),
])
def test_relatives_become_a_warm_start(tmp_path, architecture, relative, kwargs):
    path = tmp_path / 'relative.safetensors'
    other = (VOLO if 'volo' in relative else SwinTransformer)(**kwargs)
    safetensors.torch.save_file(other.state_dict(), path)
    conversion = convert(path, architecture)
    assert conversion.kind == 'warm-start'
    assert torch.equal(conversion.model.norm.weight, other.norm.weight)
    assert conversion.report.count('same') and conversion.report.count('missing')
    assert conversion.report.count('dropped')
    folder = save(conversion, tmp_path / 'out', path)
    assert 'no trained model' in (folder / 'README.md').read_text()
    assert_right(timm.create_model(f'local-dir:{folder}', pretrained=True), conversion.model)
    again = convert(path, architecture)  # the same file gives the same folder
    assert_right(again.model, conversion.model)


def test_relatives_that_the_model_has_more_paths_than(tmp_path):
    path = tmp_path / 'x.safetensors'
    model = timm.create_model('test_lg', num_classes=7)
    safetensors.torch.save_file(model.state_dict(), path)
    conversion = convert(path, 'test_lg')
    assert conversion.kind == 'weights' and conversion.model.num_classes == 7
    assert_right(conversion.model, model)
    other = SwinTransformer(
        img_size=64, embed_dim=24, depths=(1, 2, 2, 1), num_heads=(1, 2, 4, 8), window_size=4, mlp_ratio=3.)
    safetensors.torch.save_file(other.state_dict(), path)
    conversion = convert(path, 'test_lg')
    assert conversion.kind == 'warm-start' and 'are zero' in conversion.summary
    reported = {target for _, targets, _ in conversion.report.rows for target in targets}
    assert reported == set(conversion.model.state_dict())


def test_averaged_weights_of_relatives(tmp_path):
    other = SwinTransformer(img_size=64, embed_dim=24, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=2)
    averaged = {k: x + 1 for k, x in other.state_dict().items()}
    path = _write(tmp_path / 'x', dict(other.state_dict()), state_dict_ema=averaged)
    assert torch.equal(convert(path, 'test_elsa_swin').model.norm.weight, averaged['norm.weight'])
    assert torch.equal(convert(path, 'test_elsa_swin', use_ema=False).model.norm.weight, other.norm.weight)


def test_licence_and_labels_are_those_of_the_file(tmp_path, weights):
    model = timm.create_model(ARCHITECTURE, num_classes=2)
    mine = tmp_path / 'mine'
    timm.models.save_for_hf(model, mine, model_config=dict(label_names=['cat', 'dog']), safe_serialization=True)
    path = mine / 'model.safetensors'
    folder = save(convert(path, ARCHITECTURE), tmp_path / 'out', path)
    config, card = json.loads((folder / 'config.json').read_text()), (folder / 'README.md').read_text()
    assert config['label_names'] == ['cat', 'dog']
    assert config['pretrained_cfg']['license'] == 'unknown' and not config['pretrained_cfg'].get('origin_url')
    assert 'license: unknown' in card and 'github.com' not in card and '2112.12786' in card
    save(convert(path, ARCHITECTURE), folder, path, license='cc-by-4.0')
    assert 'license: cc-by-4.0' in (folder / 'README.md').read_text()
    for text in ('{', '[]', '{"label_names": [1, 2]}', '{"label_names": ["a"]}'):
        (mine / 'config.json').write_text(text)
        assert convert(path, ARCHITECTURE).label_names is None
    path = _write(tmp_path / 'authors', to_authors(weights.state_dict()))
    folder = save(convert(path, ARCHITECTURE), tmp_path / 'theirs', path)
    assert 'the authors\' is at https://github.com/damo-cv/ELSA' in (folder / 'README.md').read_text()
    assert json.loads((folder / 'config.json').read_text())['pretrained_cfg']['license'] == 'mit'


# the folder


@pytest.fixture(scope='module')
def folder(weights, tmp_path_factory):
    root = tmp_path_factory.mktemp('converted')
    path = _write(root / 'checkpoint.pth.tar', to_authors(weights.state_dict()))
    return save(convert(path, ARCHITECTURE), root / released.NAME, path, tag='authors')


def test_model_card(folder, weights):
    lines = (folder / 'README.md').read_text().splitlines()
    assert lines[0] == '---' and 'import elsa_models' in '\n'.join(lines[:12])
    assert any(line.startswith('license: mit') for line in lines)
    card = '\n'.join(lines)
    num_params = sum(p.numel() for p in weights.parameters())
    assert f'{num_params:,}' in card and f'{count_macs(weights) / 1e9:.2f}' in card
    assert 'top-1' not in card and '%' not in card and 'No accuracy is stated' in card
    code = card.split('```python\n')[1].split('```')[0].replace(f'hf-hub:OWNER/{released.NAME}', f'local-dir:{folder}')
    scope = {}
    exec(code, scope)  # what the card says works
    assert_right(scope['model'], weights)


def test_folders_are_complete_or_not_there(tmp_path, weights, monkeypatch):
    path = _write(tmp_path / 'x', to_authors(weights.state_dict()))
    conversion = convert(path, ARCHITECTURE)
    with monkeypatch.context() as m:
        m.setattr('elsa_models.hub.card.count_macs', lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            save(conversion, tmp_path / 'out', path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['x']
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out' / 'thesis.tex').write_text('')
    with pytest.raises(OutputError, match='thesis.tex'):
        save(conversion, tmp_path / 'out', path)
    (tmp_path / 'out' / 'thesis.tex').unlink()
    save(conversion, tmp_path / 'out', path)
    save(conversion, tmp_path / 'out', path)  # replaces its like


@pytest.mark.skipif(not hasattr(os, 'fork'), reason='kills a forked process')
def test_killed_between_its_two_renames_a_later_conversion_puts_it_right(tmp_path, weights):
    path = _write(tmp_path / 'x', to_authors(weights.state_dict()))
    conversion = convert(path, ARCHITECTURE)
    save(conversion, tmp_path / 'out', path)
    child = os.fork()
    if child == 0:
        rename, Path.rename = Path.rename, lambda self, target: (
            os._exit(9) if Path(target) == tmp_path / 'out' else rename(self, target))
        try:
            save(conversion, tmp_path / 'out', path)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert not (tmp_path / 'out').exists() and len(list(tmp_path.iterdir())) == 3
    save(conversion, tmp_path / 'out', path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['out', 'x']
    assert check_folder(tmp_path / 'out')['architecture'] == ARCHITECTURE


@pytest.mark.parametrize('argument, kwargs', [
    ('architecture: got', dict(architecture='resnet18')), ('architecture: got', dict(architecture='elsa_swin_huge')),
    ('kind: got', dict(architecture=ARCHITECTURE, kind='x'))])
def test_arguments_of_convert(tmp_path, argument, kwargs):
    with pytest.raises(ValueError, match=argument):
        convert(tmp_path / 'absent', **kwargs)


def test_another_architecture_is_an_error(tmp_path, weights):
    path = _write(tmp_path / 'x', to_authors(weights.state_dict()))
    for architecture in ('test_elsa_swin', 'elsa_swin_tiny', 'test_elsa_volo'):
        with pytest.raises(WeightsError, match='does not fit') as e:
            convert(path, architecture)
        assert len(str(e.value)) < 1200
    few = {k: x for k, x in to_authors(weights.state_dict()).items() if not k.startswith(('layers.', 'head.'))}
    with pytest.raises(WeightsError, match=r'has 6 of the \d+ entries, and 0 others\. Missing \(\d+\): layers\.0\.'):
        convert(_write(tmp_path / 'y', few), ARCHITECTURE, kind='weights')
    torch.save(_detector(weights), path)
    with pytest.raises(WeightsError, match='has the entries of a backbone with four norms'):
        convert(path, 'test_elsa_volo')
    torch.save(dict(a=torch.zeros(2)), path)
    with pytest.raises(WeightsError, match='nothing in common'):
        convert(path, ARCHITECTURE)


def test_convert_script(tmp_path, weights):
    path = _write(tmp_path / 'x.pth.tar', to_authors(timm.create_model('test_elsa_swin').state_dict()))

    def run(*args):
        return subprocess.run(
            [sys.executable, SCRIPTS / 'convert_checkpoint.py', *map(str, args)], text=True, capture_output=True,
            timeout=60)

    done = run('test_elsa_swin', path, tmp_path / 'out', '--tag', 'mine')
    assert done.returncode == 0, done.stderr
    assert 'renamed+transposed' in done.stdout and '1 dropped' in done.stdout and 'local-dir:' in done.stdout
    assert json.loads((tmp_path / 'out' / 'config.json').read_text())['pretrained_cfg']['tag'] == 'mine'
    done = run('elsa_swin_tiny', path, tmp_path / 'other')
    assert done.returncode == 2 and done.stderr.startswith('error: checkpoint does not fit') and (
        'Traceback' not in done.stderr)
    assert not (tmp_path / 'other').exists()


# publishing


def test_publish_then_load_gives_bit_equal_logits(hub, folder, weights, image, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    published = publish(folder, f'org/{released.NAME}')
    tree = hub.repos[f'org/{released.NAME}']['commits'][published.revision]
    assert tree.keys() == {'.gitattributes', 'README.md', 'config.json', 'model.safetensors'}
    assert f'hf-hub:org/{released.NAME}' in tree['README.md'].decode()
    monkeypatch.delenv('HF_TOKEN')
    repo = f'hf-hub:org/{released.NAME}'
    for model in (load(), load(repo), load(f'{repo}@{published.revision}')):
        assert torch.equal(model(image), weights(image))


def test_publish_to_a_private_repository_and_a_branch(hub, folder, weights, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    published = publish(folder, 'me/mine', private=True, revision='v1', message='first')
    repo = hub.repos['me/mine']
    assert repo['private'] and repo['branches']['v1'] == published.revision
    assert 'model.safetensors' not in repo['commits'][repo['branches']['main']]
    assert_right(load('hf-hub:me/mine@v1'), weights)
    publish(folder, 'me/mine', private=True, revision='v1')  # again, onto what is there
    monkeypatch.delenv('HF_TOKEN')
    with pytest.raises(Exception, match='401'):
        load('hf-hub:me/mine@v1', cache_dir=folder.parent / 'empty')


def test_dry_run_sends_nothing_and_says_what_would_be_sent(hub, folder, monkeypatch):
    published = publish(folder, 'org/x', dry_run=True, revision='v1')
    assert not hub.requests and published.revision == 'v1'
    assert [line.split()[0] for line in published.files] == ['README.md', 'config.json', 'model.safetensors']
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    sent = publish(folder, 'org/x')
    assert sent.files == published.files
    tree = hub.repos['org/x']['commits'][sent.revision]
    for line in sent.files:
        name, size, digest = line.split()
        assert (int(size), digest) == (len(tree[name]), hashlib.sha256(tree[name]).hexdigest())


def test_publish_refuses(hub, folder, tmp_path, monkeypatch):
    import shutil
    for repo_id in ('x', '/x', 'a/b/c', 'a/'):
        with pytest.raises(ValueError, match='repo_id: got'):
            publish(folder, repo_id)
    with pytest.raises(WeightsError, match='was not published.*401.*HF_TOKEN'):
        publish(folder, 'org/x')
    hub.requests.clear()
    bad = tmp_path / 'bad'

    def spoilt():
        shutil.rmtree(bad, ignore_errors=True)
        shutil.copytree(folder, bad)

    spoilt()
    (bad / 'config.json').unlink()
    with pytest.raises(WeightsError, match='has no file config.json'):
        publish(bad, 'org/x')
    spoilt()
    (bad / 'README.md').write_text('a model')
    with pytest.raises(WeightsError, match='import elsa_models'):
        publish(bad, 'org/x')
    spoilt()
    (bad / 'model.safetensors').write_bytes((bad / 'model.safetensors').read_bytes()[:-1])
    with pytest.raises(WeightsError, match='cannot be read'):
        publish(bad, 'org/x')
    spoilt()
    other = {k: x + 1 for k, x in safetensors.torch.load_file(bad / 'model.safetensors').items()}
    safetensors.torch.save_file(other, bad / 'model.safetensors')
    with pytest.raises(WeightsError, match='does not give the sha256'):
        publish(bad, 'org/x')
    spoilt()
    (bad / 'model.safetensors').unlink()
    (bad / 'model.safetensors').symlink_to(folder / 'model.safetensors')
    with pytest.raises(WeightsError, match='has no file model.safetensors'):
        publish(bad, 'org/x')
    spoilt()
    config = json.loads((bad / 'config.json').read_text())
    (bad / 'config.json').write_text(json.dumps({**config, 'architecture': 'resnet18'}))
    with pytest.raises(WeightsError, match='not one of this package'):
        publish(bad, 'org/x')
    assert not hub.requests
    assert check_folder(folder)['architecture'] == ARCHITECTURE


def test_publish_notices_what_the_hub_holds(hub, folder, monkeypatch):
    monkeypatch.setenv('HF_TOKEN', 'hf_right')
    path_info = hub._path_info
    monkeypatch.setattr(hub, '_path_info', lambda path, data: path_info(path, data[:-1]))
    with pytest.raises(WeightsError, match='does not hold the model.safetensors that was sent'):
        publish(folder, 'org/x')


def test_scripts_publish_and_load_by_environment_variables(hub_server, folder, weights, image, tmp_path):
    code = f'''
    from elsa_models.commands import publish
    assert publish.main([{str(folder)!r}, 'org/{released.NAME}', '--private']) == 0
    model = timm.create_model('{released.NAME}', pretrained=True).eval()
    image = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    torch.save(model(image), {str(tmp_path / 'logits')!r})
    '''
    out = run_child(code, tmp_path / 'home2', hub=hub_server.url, HF_TOKEN='hf_right', ELSA_HUB_NAMESPACE='org')
    assert out.startswith(f'published {hub_server.url}/org/{released.NAME} at ')
    assert torch.allclose(torch.load(tmp_path / 'logits'), weights(image), atol=1e-6)  # of another process
