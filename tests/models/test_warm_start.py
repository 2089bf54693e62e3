"""Starting from the weights of timm's VOLO and Swin, or of another model of ours."""
import re

import pytest
import torch
from helpers import to_authors
from safetensors.torch import save_file
from timm import create_model
from timm.layers import resample_abs_pos_embed_nhwc, resize_rel_pos_bias_table
from timm.models import save_for_hf
from timm.models.volo import VOLO as VisionOutlooker

import elsa_models  # noqa: F401  registers the models
from elsa_models.models import WarmStartReport, _warm_start, warm_start

# one block per stage keeps the widths, names and kinds of the real models
VOLO = dict(layers=(1, 1, 1, 1), num_classes=5)
SWIN = dict(depths=(1, 1, 1, 2), num_classes=5)


def volo(**kwargs):
    # the entry point fixes the depth
    widths = dict(embed_dims=(192, 384, 384, 384), num_heads=(6, 12, 12, 12))
    return randomized(VisionOutlooker(**{**widths, **VOLO, **kwargs}))


def elsa_volo(name='elsa_volo_d1_224', **kwargs):
    return create_model(name, **dict(VOLO, **kwargs)).eval()


def swin(**kwargs):
    return randomized(create_model('swin_tiny_patch4_window7_224', **dict(SWIN, **kwargs)))


def elsa_swin(name='elsa_swin_tiny', **kwargs):
    return create_model(name, **dict(SWIN, **kwargs)).eval()


def randomized(model):
    """No entry at a value that an initialisation could have given it as well."""
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            if x.is_floating_point():
                x.uniform_(.5, 1.5)
            elif x.dim() == 0:
                x.fill_(7)  # batches that a norm has seen
    return model.eval()


def state(model):
    return {k: x.clone() for k, x in model.state_dict().items()}


def check_report(report, model, before):
    """The groups partition the state dict, say what is true of it, and add up to the model's parameters."""
    assert isinstance(report, WarmStartReport)
    after = model.state_dict()
    groups = [report.copied, report.resized, report.left]
    assert sorted(k for g in groups for k in g) == sorted(after)
    for k, n in ((k, n) for g in groups for k, n in g.items()):
        assert n == (after[k].numel() if k in dict(model.named_parameters()) else 0)
    total = sum(p.numel() for p in model.parameters())
    assert report.num_copied + report.num_resized + report.num_left == report.num_params == total
    for k in after:
        assert torch.equal(after[k], before[k]) == (k in report.left), k
    text = str(report)
    assert f'{total:,} parameters' in text
    for group, num in (('copied', report.num_copied), ('resized', report.num_resized), ('left', report.num_left)):
        assert re.search(rf'^  {group} +{num:,} ', text, re.MULTILINE), text
    return after


def test_volo_d1_from_a_file(tmp_path):
    source = randomized(create_model('volo_d1_224'))
    path = tmp_path / 'volo_d1_224.pth'
    torch.save(source.state_dict(), path)
    model = create_model('elsa_volo_d1_224')
    before = state(model)
    report = warm_start(model, str(path))
    after = check_report(report, model, before)
    for k, x in source.state_dict().items():
        if not re.match(r'network\.0\.\d+\.attn\.', k):
            assert torch.equal(after[k], x), k
            assert k in report.copied
    attention = {k for k in after if re.match(r'network\.0\.\d+\.attn\.', k)}
    assert len(attention) == 4 * 9 and set(report.left) == attention
    assert not report.resized
    assert all(re.match(r'network\.0\.\d\.attn\.', k) for k in report.unused) and len(report.unused) == 4 * 5
    assert 'network.0.0.attn, network.0.1.attn, network.0.2.attn, network.0.3.attn' in str(report)

    # on to another size
    larger = create_model('elsa_volo_d1_384')
    before = state(larger)
    report = warm_start(larger, path)
    after = check_report(report, larger, before)
    expected = resample_abs_pos_embed_nhwc(source.pos_embed.detach(), [24, 24])
    assert list(report.resized) == ['pos_embed'] and report.num_resized == 24 * 24 * 384
    assert torch.equal(after['pos_embed'], expected)
    assert set(report.left) == attention


def test_warm_started_model_loads_at_another_size(tmp_path):
    model = elsa_volo()
    warm_start(model, volo())
    path = tmp_path / 'model.safetensors'
    save_file(model.state_dict(), path)
    load = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(path), num_classes=5))
    larger = elsa_volo('elsa_volo_d1_384', **load)
    model.set_input_size(img_size=384)
    assert all(torch.equal(x, larger.state_dict()[k]) for k, x in model.state_dict().items())


@pytest.mark.parametrize('size', [224, 384, (256, 320)])
def test_swin(size):
    source = swin()
    model = elsa_swin()
    model.set_input_size(img_size=size)  # windows grow along
    before = state(model)
    report = warm_start(model, source)
    after = check_report(report, model, before)
    local = tuple(f'layers.{i}.blocks.0.attn.' for i in range(3))
    tables = {f'layers.3.blocks.{i}.attn.relative_position_bias_table' for i in range(2)}
    assert set(report.left) == {k for k in after if k.startswith(local)}
    assert set(report.resized) == (set() if size == 224 else tables)
    for k, x in source.state_dict().items():
        if k in tables and size != 224:
            window = model.layers[3].blocks[0].attn.window_size
            x = resize_rel_pos_bias_table(x, window, after[k].shape)
        if not k.startswith(local):
            assert torch.equal(after[k], x), k
    assert {k for k in report.unused} <= {k for k in source.state_dict() if k.startswith(local)}


def test_swin_checkpoint_in_its_authors_names(tmp_path):
    source = swin()
    renamed = {}
    for k, x in source.state_dict().items():
        k = re.sub(r'^layers\.(\d)\.downsample', lambda m: f'layers.{int(m.group(1)) - 1}.downsample', k)
        renamed[k.replace('head.fc.', 'head.')] = x
    renamed['layers.3.blocks.0.attn.relative_position_index'] = torch.zeros(49, 49, dtype=torch.long)
    torch.save({'model': renamed}, tmp_path / 'swin.pth')
    a, b = elsa_swin(), elsa_swin()
    warm_start(b, source)
    report = warm_start(a, tmp_path / 'swin.pth')
    assert all(k.startswith(('layers.0', 'layers.1', 'layers.2')) and '.attn.' in k for k in report.left)
    left = tuple(report.left)
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items() if k not in left)


def test_elsa_swin_in_its_authors_names(tmp_path):
    source = randomized(elsa_swin())
    torch.save({'state_dict': to_authors(source.state_dict())}, tmp_path / 'elsa.pth')
    model = elsa_swin(num_classes=3)
    report = warm_start(model, tmp_path / 'elsa.pth')
    assert set(report.left) == {'head.fc.weight', 'head.fc.bias'}
    assert all(torch.equal(x, source.state_dict()[k]) for k, x in model.state_dict().items() if k not in report.left)


def test_one_of_ours_is_copied_whole():
    for make in (elsa_volo, elsa_swin):
        source, model = randomized(make()), make()
        report = warm_start(model, source)
        assert not report.left and not report.resized and not report.unused
        assert all(torch.equal(x, source.state_dict()[k]) for k, x in model.state_dict().items())


def test_ours_with_another_kernel_keeps_what_depends_on_it():
    report = warm_start(elsa_volo(kernel_size=7), randomized(elsa_volo()))
    parts = ('attn_conv.weight', 'attn_logits.weight', 'attn_logits.bias', 'ghost_mul', 'ghost_add')
    assert set(report.left) == {f'network.0.0.attn.{p}' for p in parts}


def test_stages_of_another_kind_are_left():
    source = randomized(elsa_swin(local_stages=(True, True, True, True)))
    model = elsa_swin()
    before = state(model)
    report = warm_start(model, source)
    check_report(report, model, before)
    assert {k.rpartition('.attn.')[0] for k in report.left} == {'layers.3.blocks.0', 'layers.3.blocks.1'}


def test_other_classes_channels_and_depths():
    source = volo(layers=(2, 1, 3, 1))
    model = elsa_volo(num_classes=11, in_chans=1, layers=(1, 2, 1, 1))
    before = state(model)
    report = warm_start(model, source)
    after = check_report(report, model, before)
    heads = {f'{h}.{p}' for h in ('head', 'aux_head') for p in ('weight', 'bias')}
    assert heads <= set(report.left)
    assert {k for k in after if k.startswith('network.2.1.')} <= set(report.left)  # deeper than the source
    assert list(report.resized) == ['patch_embed.conv.0.weight']
    torch.testing.assert_close(
        after['patch_embed.conv.0.weight'], source.patch_embed.conv[0].weight.detach().sum(dim=1, keepdim=True))
    back = elsa_volo(in_chans=3)
    warm_start(back, model)
    torch.testing.assert_close(
        back.patch_embed.conv[0].weight, model.patch_embed.conv[0].weight.expand(-1, 3, -1, -1) / 3)


def test_batch_norm_statistics_are_copied():
    source, model = volo(), elsa_volo()
    report = warm_start(model, source)
    norm, own = source.patch_embed.conv[1], model.patch_embed.conv[1]
    assert torch.equal(own.running_var, norm.running_var) and own.num_batches_tracked == 7
    assert report.copied['patch_embed.conv.1.running_var'] == 0


def test_model_without_aux_head():
    model = elsa_volo(use_aux_head=False)
    report = warm_start(model, volo())
    assert {'aux_head.weight', 'aux_head.bias'} <= set(report.unused)


def test_source_in_a_wrapper():
    source = volo()
    a, b = elsa_volo(), elsa_volo()
    b.load_state_dict(a.state_dict())
    warm_start(a, source)
    warm_start(b, torch.nn.DataParallel(source))
    assert all(torch.equal(x, b.state_dict()[k]) for k, x in a.state_dict().items())


def test_half_precision_source():
    model = elsa_volo()
    source = volo().half()
    warm_start(model, source)
    assert model.norm.weight.dtype == torch.float32
    assert torch.equal(model.norm.weight, source.norm.weight.float())


def test_local_folder(tmp_path):
    source = randomized(create_model('volo_d1_224', num_classes=5))
    save_for_hf(source, tmp_path)
    model = create_model('elsa_volo_d1_224', num_classes=5)
    before = state(model)
    torch.manual_seed(5)
    report = warm_start(model, f'local-dir:{tmp_path}')
    assert torch.equal(torch.rand(3), torch.rand(3, generator=torch.Generator().manual_seed(5)))  # nothing was drawn
    check_report(report, model, before)
    assert torch.equal(model.norm.weight, source.norm.weight)


def test_folder_of_a_run_and_what_is_in_it(tmp_path):
    source = randomized(create_model('test_elsa_swin', num_classes=5))
    save_for_hf(source, tmp_path / 'run' / 'model')
    (tmp_path / 'run' / 'checkpoints').mkdir()
    torch.save(dict(model=source.state_dict()), tmp_path / 'run' / 'checkpoints' / 'best.pt')
    names = ['run', 'local-dir:run', 'run/model', 'local-dir:run/model', 'run/checkpoints/best.pt']
    for name in names:
        prefix, _, path = name.rpartition(':')
        model = create_model('test_elsa_swin', num_classes=5)
        warm_start(model, f'{prefix}:{tmp_path / path}' if prefix else tmp_path / path)
        assert torch.equal(model.head.fc.weight, source.head.fc.weight)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(ValueError, match='source: .*empty.*holds no config.json'):
        warm_start(model, tmp_path / 'empty')


@pytest.mark.parametrize('name', ['volo_d1_224.sail_in1k', 'volo_d1_224', 'hf-hub:timm/volo_d1_224.sail_in1k'])
def test_names_are_downloaded_by_timm(name, monkeypatch):
    source, model, asked = volo(), elsa_volo(), []

    def create(name, **kwargs):
        asked.append((name, kwargs))
        return source

    monkeypatch.setattr(_warm_start.timm, 'create_model', create)
    report = warm_start(model, name)
    assert asked == [(name, dict(pretrained=True))] and report.source == name
    assert torch.equal(model.norm.weight, source.norm.weight)


def other_family():
    # a ViT of the same width: class token, norm and heads have the names and shapes of VOLO's
    vit = create_model('vit_small_patch16_224', depth=1, num_classes=5)
    assert vit.cls_token.shape == elsa_volo().cls_token.shape and vit.norm.weight.shape == (384,)
    return vit


@pytest.mark.parametrize('model,source,message', [
    (elsa_volo, other_family, r'nothing in common .* named network\.\*'),
    (elsa_volo, swin, r'nothing in common .* named network\.\*'),
    (elsa_swin, volo, r'nothing in common .* named layers\.\*'),
    (elsa_volo, elsa_swin, r'nothing in common'),
    # the same names and often the same shapes, with other meaning
    (elsa_swin, lambda: create_model('swinv2_tiny_window8_256', **SWIN), r"of another family, it has 'layers\.3.*'"),
    # the right family in another width: only the stem's convolutions would fit
    (lambda: elsa_volo('elsa_volo_d2_224'), volo, r'nothing in common .*\(192,\) there and \(256,\) in the model'),
    (elsa_volo, lambda: torch.nn.Linear(3, 3), r'nothing in common'),
])
def test_sources_with_nothing_in_common_are_refused(model, source, message):
    model = model()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        warm_start(model, source())
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


@pytest.mark.parametrize('source,error,message', [
    ('no_such_model', ValueError, r"source: got 'no_such_model', which is neither a file nor a model of timm"),
    ('volo_d1_244', ValueError, r'Near are .*volo_d1_224'),
    ('no/such/file.pth', FileNotFoundError, 'no such file'),
    ('elsa_volo_d2_224', RuntimeError, 'none were ever released'),
    (3, TypeError, 'source: got int'),
])
def test_bad_sources_are_refused(source, error, message):
    model = elsa_volo()
    before = state(model)
    with pytest.raises(error, match=message):
        warm_start(model, source)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_damaged_file_is_refused(tmp_path):
    path = tmp_path / 'half.pth'
    torch.save(volo().state_dict(), path)
    path.write_bytes(path.read_bytes()[:10000])
    model = elsa_volo()
    before = state(model)
    with pytest.raises(RuntimeError, match='cannot be read'):
        warm_start(model, path)
    assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())


def test_models_that_cannot_be_started_are_refused():
    with pytest.raises(TypeError, match='model: got VOLO, must be'):
        warm_start(volo(), volo())
    with pytest.raises(TypeError, match='model: got FeatureGetterNet, must be .* For features'):
        warm_start(create_model('test_elsa_volo', features_only=True), volo())
    with pytest.raises(ValueError, match='model: is on the meta device'):
        warm_start(elsa_volo(device='meta'), volo())
    with pytest.raises(ValueError, match='source: is on the meta device'):
        warm_start(elsa_volo(), create_model('volo_d1_224', device='meta'))


def test_warm_started_model_keeps_training():
    model = elsa_volo().train().requires_grad_(True)
    warm_start(model, volo())
    assert model.training and all(p.requires_grad and p.is_leaf for p in model.parameters())
    model(torch.rand(2, 3, 224, 224)).sum().backward()
    assert all(p.grad is not None for p in model.parameters())
