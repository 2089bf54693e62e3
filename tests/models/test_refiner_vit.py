"""Refiner-ViT: the authors' function in float64, at any size, with token labels, features and attention to look at."""
import copy
import logging

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import assert_near, max_error
from refiner_reference import (
    MISTAKES,
    Reference,
    keyed,
    keyed_state_dict,
    randomise,
    recorded,
    recorded_gradients,
    to_authors,
)
from timm import create_model
from timm.layers import resample_abs_pos_embed
from timm.models import save_for_hf

import elsa_models
from elsa_models import reestimate_batch_norm, token_label_loss
from elsa_models.inspect import count_macs
from elsa_models.layers.mixers.refined import MapAttention, RefinedAttention
from elsa_models.models import _token_labels
from elsa_models.models.refiner_vit import to_own_names

# parameters without and with aux head, GMACs without
TABLE = {
    'refiner_vit_small_patch16_224': (25_023_656, 25_408_656, 6.74),
    'refiner_vit_small_patch16_384': (25_169_576, 25_554_576, 23.87),
    'refiner_vit_medium_patch16_224': (55_029_932, 55_450_932, 13.42),
    'refiner_vit_medium_patch16_384': (55_189_532, 55_610_532, 47.91),
    'refiner_vit_large_patch16_224': (80_637_192, 81_150_192, 19.09),
    'refiner_vit_large_patch16_384': (80_831_752, 81_344_752, 68.21),
    'refiner_vit_large_patch16_448': (80_938_248, 81_451_248, 101.96),
}
# the network of the recorded gradients
RECORDED = dict(
    img_size=32, patch_size=8, stem_dims=(32, 64, 128), embed_dim=24, depth=4, num_heads=4, num_classes=10,
    dtype=torch.float64)


def small(**kwargs):
    return create_model('test_refiner_vit', **dict(dict(num_classes=10), **kwargs)).eval()


def of_authors(listing, name='test_refiner_vit', **kwargs):
    """A model with keyed weights that come in the authors' names."""
    state = keyed_state_dict(listing)
    return create_model(
        name, pretrained=True,
        pretrained_cfg_overlay=dict(state_dict=state, num_classes=kwargs.get('num_classes', 1000)), **kwargs).eval()


def num_params(model):
    return sum(p.numel() for p in model.parameters())


def set_lean(model, lean):
    for module in model.modules():
        if hasattr(module, 'lean'):
            module.lean = lean
    return model


@pytest.mark.parametrize('name', TABLE)
def test_counts(name):
    without, with_aux, _ = TABLE[name]
    model = create_model(name, device='meta', use_aux_head=False)
    assert num_params(model) == without
    assert num_params(create_model(name, device='meta')) == with_aux


@pytest.mark.parametrize('name', [n if 'small' in n else pytest.param(n, marks=pytest.mark.slow) for n in TABLE])
def test_multiply_accumulates(name):
    model = create_model(name, device='meta', use_aux_head=False)
    assert count_macs(model) / 1e9 == pytest.approx(TABLE[name][2], abs=.0051)


def test_names():
    names = timm.list_models('*refiner_vit*')
    assert sorted(names) == sorted([*TABLE, 'test_refiner_vit'])
    assert not timm.list_models('*refiner*', pretrained=True)
    for name in TABLE:
        cfg = timm.get_pretrained_cfg(name)
        assert cfg.input_size == (3, int(name[-3:]), int(name[-3:])) and cfg.mean == cfg.std == (.5, .5, .5)


# the authors' numbers


def test_small_model_at_224():
    model = of_authors('refiner_S_224_aux', 'refiner_vit_small_patch16_224', dtype=torch.float64)
    images = keyed('image.224x224', (2, 3, 224, 224))
    plain, with_aux = recorded('refiner_S_224'), recorded('refiner_S_224_aux')
    with torch.no_grad():
        tokens = model.forward_features(images)
        logits = model.forward_head(tokens)
        aux = model.aux_head(tokens[:, 1:]).max(dim=1).values
    assert_near(tokens[:, [0, 1, 98, 196]], plain['feat_224x224'], 1e-12)
    assert_near(model.head(tokens[:, 0]), plain['logits_224x224'], 1e-12)
    assert_near(model.head(tokens[:, 0]), with_aux['cls_224x224'], 1e-12)
    assert_near(aux, with_aux['auxmax_224x224'], 1e-12)
    assert_near(logits, with_aux['logits_224x224'], 1e-12)
    with torch.no_grad():  # and in float32 as exact as float32 is
        assert_near(model.float()(images.float()), logits, 1e-4)


@pytest.mark.parametrize('lean', [True, False])
@pytest.mark.parametrize('kind', ['eval', 'eval_aux', 'train_aux'])
def test_gradients_of_the_network(kind, lean):
    values, gradients = recorded(f'refiner_test_{kind}'), recorded_gradients(f'refiner_test_{kind}')
    model = set_lean(of_authors('refiner_test', use_aux_head='aux' in kind, **RECORDED), lean)
    images = keyed('image.32x32', (4, 3, 32, 32)).requires_grad_()
    if 'train' in kind:
        output = model.train().forward_train(images)
        logits, aux = output.logits, output.token_logits.flatten(1, 2)
        assert_near(aux, values['aux'], 1e-12)
        assert output.box == tuple(values['bbox'].tolist())
        loss = (logits * keyed('up.logits', logits.shape)).sum() + (aux * keyed('up.aux', aux.shape)).sum()
    else:
        logits = model(images)
        loss = (logits * keyed('up.logits', logits.shape)).sum()
    assert_near(logits, values['logits'], 1e-12)
    loss.backward()
    assert_near(images.grad[:, :, ::4], values['grad_in'], 1e-12)
    found = {to_authors(name): p.grad for name, p in model.named_parameters()}
    assert found.keys() == gradients.keys()
    scale = max(norm for _, norm in gradients.values())
    for key, (dot, norm) in gradients.items():
        tolerance = 1e-10 * (norm + 1e-4 * scale)
        assert abs((found[key] * keyed(f'probe:{key}', found[key].shape)).sum().item() - dot) <= tolerance, key
        assert abs(found[key].norm().item() - norm) <= tolerance, key
    after = {to_authors(name): x for name, x in model.named_buffers()}
    for key in values:
        if key.startswith('after_'):
            assert_near(after[key.removeprefix('after_')], values[key], 1e-12, key)


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_would_show(mistake):
    values = recorded('refiner_test_eval_aux')
    images = keyed('image.32x32', (4, 3, 32, 32))
    state = keyed_state_dict('refiner_test')
    assert max_error(Reference(state, 4)(images), values['logits']) < 1e-12
    # the tests above allow 1e-12
    assert max_error(Reference(state, 4, mistake=mistake)(images), values['logits']) > 1e-8


# sizes and modes that are not recorded, against a plain reference


@pytest.mark.parametrize('name,size', [
    ('refiner_vit_medium_patch16_224', (32, 48)), ('refiner_vit_large_patch16_448', (48, 32)),
    ('refiner_vit_small_patch16_384', (64, 16))])
def test_every_width_is_that_of_the_reference(name, size):
    model = create_model(name, img_size=size, depth=5, num_classes=7, dtype=torch.float64).eval()
    reference = Reference(randomise(model), model.blocks[0].attn.num_heads)
    images = keyed('image', (2, 3, *size))
    with torch.no_grad():
        assert_near(model(images), reference(images), 1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in TABLE if 'small' not in n or '384' in n])
def test_every_name_is_that_of_the_reference(name):
    model = create_model(name, dtype=torch.float64).eval()
    reference = Reference(randomise(model), model.blocks[0].attn.num_heads)
    images = keyed('image', (1, 3, *model.patch_embed.img_size))
    with torch.no_grad():
        assert_near(model(images), reference(images), 1e-9)


@pytest.mark.parametrize('lean', [True, False])
@pytest.mark.parametrize('size,box', [((32, 32), (1, 0, 3, 3)), ((40, 24), (0, 1, 5, 2))])
def test_training_with_mixing(size, box, lean, monkeypatch):
    model = create_model('test_refiner_vit', **dict(RECORDED, img_size=size, use_mix_token=True)).train()
    set_lean(model, lean)
    state = {k: x.clone().requires_grad_(x.is_floating_point() and 'running' not in k)
             for k, x in randomise(model).items()}
    reference = Reference(state, 4, training=True)
    images = keyed('image', (3, 3, *size))
    monkeypatch.setattr(_token_labels, 'rand_bbox', lambda *args: box)
    h, w = (s // 8 for s in size)
    target, dense = torch.tensor([1, 4, 9]), keyed('dense', (3, h, w, 10)).softmax(-1)
    output = model.forward_train(images)
    token_label_loss(output, target, dense).backward()

    top, left, bottom, right = box
    patches = reference.patches(images)
    mixed = patches.clone()
    mixed[:, :, top:bottom, left:right] = patches.flip(0)[:, :, top:bottom, left:right]
    logits, aux = reference.heads(reference.tokens(mixed))
    aux = aux.reshape(3, h, w, 10)
    own = aux.clone()
    own[:, top:bottom, left:right] = aux.flip(0)[:, top:bottom, left:right]
    lam = 1 - (bottom - top) * (right - left) / (h * w)
    one_hot = F.one_hot(target, 10).double()
    expected = -((lam * one_hot + (1 - lam) * one_hot.flip(0)) * logits.log_softmax(-1)).sum(-1).mean()
    expected = expected - .5 * (dense * own.log_softmax(-1)).sum(-1).mean()
    expected.backward()

    assert output.box == box and output.lam == pytest.approx(lam)
    assert_near(output.logits, logits, 1e-11)
    assert_near(output.token_logits, own, 1e-11)
    scale = max(x.grad.norm().item() for x in state.values() if x.requires_grad)
    for name, p in model.named_parameters():
        assert_near(p.grad, state[to_authors(name)].grad, 1e-9 * max(scale, 1.), name)
    buffers = {to_authors(name): x for name, x in model.named_buffers()}
    for key, x in reference.after.items():
        assert_near(buffers[key], x, 1e-11, key)


def test_mixing_is_drawn_and_refused_alone():
    model = small(use_mix_token=True).train()
    boxes = {model.forward_train(torch.randn(2, 3, 64, 64)).box for _ in range(5)}
    assert len(boxes) > 1
    with pytest.raises(ValueError, match='x: got a batch of 1, must be at least 2 images'):
        model.forward_train(torch.randn(1, 3, 64, 64))
    assert model.eval().forward_train(torch.randn(1, 3, 64, 64)).box == (0, 0, 0, 0)
    with pytest.raises(ValueError, match='use_mix_token: got True'):
        small(use_mix_token=True, global_pool='avg')


# training steps


@pytest.mark.parametrize('checkpointing', [False, True])
def test_three_steps_are_those_of_the_plain_form(checkpointing):
    results = []
    for lean in (True, False):
        torch.manual_seed(0)
        model = set_lean(create_model('test_refiner_vit', num_classes=10, dtype=torch.float64).train(), lean)
        model.set_grad_checkpointing(checkpointing and lean)
        optimizer = torch.optim.SGD(model.parameters(), lr=.05, momentum=.9)
        for i in range(3):
            logits = model(keyed(f'image{i}', (3, 3, 64, 64)))
            optimizer.zero_grad()
            F.cross_entropy(logits, torch.tensor([0, 3, 5])).backward()
            optimizer.step()
        results.append(model.state_dict())
    for name, x in results[0].items():
        assert_near(x, results[1][name], 1e-10, name)
    assert results[0]['blocks.1.attn.refine.bn4.num_batches_tracked'] == 3


def test_initialisation():
    model = create_model('refiner_vit_small_patch16_224', num_classes=100)
    tokens = model.pos_embed, model.cls_token
    for x in (*tokens, model.head.weight, model.aux_head.weight, model.blocks[1].attn.v.weight):
        assert x.std().item() == pytest.approx(.02, rel=.1)
    assert not model.head.bias.any() and not model.blocks[0].attn.qkv.bias.any()
    refine = model.blocks[1].attn.refine
    # as PyTorch draws convolutions: uniform up to fan_in ** -0.5
    assert refine.expand.weight.std().item() == pytest.approx(12 ** -.5 / 3 ** .5, rel=.15)
    assert model.patch_embed.proj.bias.any()
    assert torch.equal(model.blocks[3].ls2.gamma, torch.full((384,), 1e-5))
    assert [type(b.attn) for b in model.blocks] == [MapAttention, RefinedAttention] * 8
    rates = [getattr(b.drop_path2, 'drop_prob', 0.) for b in small(drop_path_rate=.3).blocks]
    assert rates == pytest.approx([0., .1, .2, .3])


def test_dropout_of_maps_is_handed_on():
    model = small(attn_drop_rate=.5, depth=2).train()
    _, maps = model.blocks[0](torch.randn(2, 10, 64))
    assert .3 < (maps == 0.).float().mean() < .7
    model.eval()
    assert (model.blocks[0](torch.randn(2, 10, 64))[1] > 0.).all()


# sizes


@pytest.mark.parametrize('mode', ['bicubic_antialias', 'bicubic', 'bilinear_corners'])
def test_positions_are_resized(mode):
    model = small(pos_interpolation=mode)
    dynamic = small(pos_interpolation=mode, dynamic_img_size=True)
    dynamic.load_state_dict(model.state_dict())
    before = model.pos_embed.detach().clone()
    model.set_input_size(img_size=(40, 96))
    expected = resample_abs_pos_embed(
        before, [5, 12], [8, 8], interpolation='bilinear' if 'bilinear' in mode else 'bicubic',
        antialias='antialias' in mode, align_corners='corners' in mode or None)
    assert torch.equal(model.pos_embed, expected)
    images = torch.randn(2, 3, 40, 96)
    with torch.no_grad():
        assert_near(dynamic(images), model(images), 1e-5)
        square = torch.randn(2, 3, 64, 64)
        dynamic_square = small(pos_interpolation=mode)
        dynamic_square.load_state_dict(dynamic.state_dict())
        assert torch.equal(dynamic(square), dynamic_square(square))
    with pytest.raises(ValueError, match="pos_interpolation: got 'nearest'"):
        small(pos_interpolation='nearest')


def test_padding_is_zeros_on_the_right_and_at_the_bottom():
    model = small(img_size=(37, 53))
    images = torch.randn(2, 3, 37, 53)
    padded = small(img_size=(40, 56))
    padded.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert_near(model(images), padded(F.pad(images, (0, 3, 0, 3))), 1e-6)


@pytest.mark.parametrize('kwargs', [
    dict(img_size=0), dict(img_size=(64,) * 3), dict(patch_size=7), dict(patch_size=8.)])
def test_bad_sizes_change_nothing(kwargs):
    with pytest.raises(ValueError, match='size: got'):
        small(**kwargs)
    model = small()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match='size: got'):
        model.set_input_size(**kwargs)
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 10)


def test_patch_size_can_change():
    model = small()
    model.set_input_size(img_size=96, patch_size=12)
    assert model.patch_embed.proj.weight.shape[-2:] == (6, 6) and model.patch_embed.grid_size == (8, 8)
    assert model.feature_info[0]['reduction'] == 12 and model(torch.randn(1, 3, 96, 96)).shape == (1, 10)


# statistics


def test_set_input_size_warns_of_statistics(caplog):
    model = small()
    with caplog.at_level(logging.WARNING, logger='elsa_models'):
        model.set_input_size(img_size=96)
        assert not caplog.records  # there are no statistics yet
        model.train()(torch.randn(2, 3, 96, 96))
        model.set_input_size(img_size=(48, 192))
        assert not caplog.records  # as many tokens
        model.set_input_size(img_size=64)
    assert 'belong to 145 tokens, there are 65 now' in caplog.text and 'reestimate_batch_norm' in caplog.text


def test_maps_that_hooks_keep_are_not_overwritten():
    model = small(img_size=64)
    x = torch.randn(2, 3, 64, 64)
    logits, addresses = model(x), []
    expected = [maps for _, _, maps in model.forward_intermediates(
        x, indices=list(range(0, len(model.blocks), 2)), return_prefix_tokens=True, return_attention=True)[1]]

    def keep(module, args, out):
        seen.append(out[1])

    for hooked in (model.blocks, [block.attn for block in model.blocks]):
        seen = []
        handles = [module.register_forward_hook(keep) for module in hooked]
        with torch.no_grad():
            assert_near(model(x), logits, 1e-5)
        for handle in handles:
            handle.remove()
        assert all(a is b for a, b in zip(seen[::2], seen[1::2]))  # handed on as they were
        for found, maps in zip(seen[::2], expected):
            assert_near(found, maps, 1e-6)
    seen = []
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: seen.append(out[1]) if isinstance(module, MapAttention) else None)
    with torch.no_grad():
        model(x)
    handle.remove()
    for found, maps in zip(seen, expected):
        assert_near(found, maps, 1e-6)
    with torch.no_grad():  # nobody keeps them: the first blocks' are those of all
        for block in model.blocks[::2]:
            attend = block.attn._attend_by_rows
            block.attn._attend_by_rows = lambda *args, attend=attend: (
                addresses.append(None if args[3] is None else args[3].data_ptr()), attend(*args))[1]
        assert_near(model(x), logits, 1e-5)
    assert addresses[0] is None and len(set(addresses[1:])) == 1


def test_statistics_are_found_anew():
    model = small(img_size=(40, 64), drop_path_rate=.5, proj_drop_rate=.2)
    model.blocks[1].eval()
    model.blocks[0].train()
    batches = [torch.randn(4, 3, 40, 64) for _ in range(3)]
    reference = copy.deepcopy(model).eval()
    seen = []
    bn = reference.blocks[3].attn.refine.bn4
    set_lean(reference, False)
    bn.register_forward_hook(lambda m, args, out: seen.append(args[0]))
    for m in reference.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train()
    with torch.no_grad():
        for x in batches:
            reference(x)
    weights = {k: p.clone() for k, p in model.named_parameters()}
    assert reestimate_batch_norm(model, iter(batches)) == 12
    found = model.blocks[3].attn.refine.bn4
    assert_near(found.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0), 1e-5)
    assert_near(found.running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0), 1e-4)
    assert found.momentum == .1 and model.blocks[0].training and not model.blocks[1].training
    assert all(torch.equal(p, weights[k]) for k, p in model.named_parameters())


def test_statistics_stay_where_no_images_come():
    model = small()
    model.train()(torch.randn(2, 3, 64, 64))
    before = copy.deepcopy(model.state_dict())

    def broken():
        yield torch.randn(2, 3, 64, 64)
        raise OSError('gone')

    for batches, error in (([], ValueError), (broken(), OSError), ([torch.zeros(0, 3, 64, 64)], ValueError)):
        with pytest.raises(error):
            reestimate_batch_norm(model, batches)
        assert all(torch.equal(x, before[k]) for k, x in model.state_dict().items())
    with pytest.raises(ValueError, match='model: Linear has no BatchNorm'):
        reestimate_batch_norm(nn.Linear(2, 2), [torch.zeros(1, 2)])


def test_statistics_found_anew_are_of_use():
    # a model whose statistics are of 64 tokens, on 256 of the same kind
    model = small(img_size=32, patch_size=4)
    images = [torch.randn(8, 3, 64, 64) for _ in range(4)]
    reestimate_batch_norm(model, [x[..., :32, :32] for x in images])
    model.set_input_size(img_size=64)
    of_batch = copy.deepcopy(model)
    for m in of_batch.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.train()
    with torch.no_grad():
        wanted = of_batch(images[0])
        before = (model(images[0]) - wanted).norm()
        reestimate_batch_norm(model, images)
        after = (model(images[0]) - wanted).norm()
    assert after < .5 * before


# checkpoints


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'ema'])
@pytest.mark.parametrize('use_aux_head', [True, False])
def test_checkpoints_of_the_authors(tmp_path, wrapper, use_aux_head):
    state = keyed_state_dict('refiner_test')
    values = recorded('refiner_test_eval_aux' if use_aux_head else 'refiner_test_eval')
    saved = {f'module.{k}': x for k, x in state.items()} if wrapper else state
    if wrapper == 'ema':
        other = {k: torch.zeros_like(x) for k, x in saved.items()}
        saved = dict(epoch=3, arch='refiner', state_dict=other, state_dict_ema=saved)
    elif wrapper:
        saved = dict(epoch=3, state_dict=saved)
    torch.save(saved, tmp_path / 'weights.pth.tar')
    overlay = dict(file=str(tmp_path / 'weights.pth.tar'), num_classes=10)
    model = create_model(
        'test_refiner_vit', pretrained=True, pretrained_cfg_overlay=overlay, use_aux_head=use_aux_head,
        **RECORDED).eval()
    with torch.no_grad():
        assert_near(model(keyed('image.32x32', (4, 3, 32, 32))), values['logits'], 1e-12)
    if wrapper == 'ema':
        overlay['use_ema'] = False
        assert not create_model(
            'test_refiner_vit', pretrained=True, pretrained_cfg_overlay=overlay, **RECORDED).head.weight.any()


def test_checkpoint_without_aux_head(tmp_path):
    state = {k: x for k, x in keyed_state_dict('refiner_test').items() if not k.startswith('aux_head')}
    torch.save(state, tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=10)
    model = create_model(
        'test_refiner_vit', pretrained=True, pretrained_cfg_overlay=overlay, use_aux_head=False, **RECORDED)
    assert model.aux_head is None
    with pytest.raises(elsa_models.WeightsError, match='aux_head.weight is missing'):
        create_model('test_refiner_vit', pretrained=True, pretrained_cfg_overlay=overlay, **RECORDED)


def test_names_of_entries():
    state = keyed_state_dict('refiner_S_224_aux')
    own = to_own_names(state)
    assert own.keys() == create_model('refiner_vit_small_patch16_224', device='meta').state_dict().keys()
    assert to_own_names(own) == own


def test_checkpoint_of_another_size(tmp_path, caplog):
    source = small()
    torch.save(source.state_dict(), tmp_path / 'weights.pth')
    overlay = dict(file=str(tmp_path / 'weights.pth'), num_classes=10)
    for size in (96, (40, 128)):
        model = small(img_size=size, pretrained=True, pretrained_cfg_overlay=overlay)
        resized = copy.deepcopy(source)
        resized.set_input_size(img_size=size)
        assert torch.equal(model.pos_embed, resized.pos_embed)
    assert 'belong to 65 tokens, there are 145 now' in caplog.text
    source.set_input_size(img_size=(40, 128))
    save_for_hf(source, tmp_path / 'folder')
    restored = create_model(f'local-dir:{tmp_path / "folder"}', pretrained=True)
    assert torch.equal(restored.pos_embed, source.pos_embed)


def test_pretrained_says_that_there_are_no_weights():
    with pytest.raises(elsa_models.WeightsError, match='none were ever released|no weights are known'):
        create_model('refiner_vit_small_patch16_224', pretrained=True)


# features, heads, attention


def test_intermediates():
    model = small()
    images = torch.randn(2, 3, 40, 64)
    model.set_input_size(img_size=(40, 64))
    features, maps = model.forward_intermediates(images, norm=True)
    assert_near(maps[-1].flatten(2).transpose(1, 2), model.forward_features(images)[:, 1:], 1e-5)
    taken = model.forward_intermediates(
        images, indices=[1, 3], return_prefix_tokens=True, output_fmt='NLC', intermediates_only=True)
    assert [(a.shape, b.shape) for a, b in taken] == [((2, 40, 64), (2, 1, 64))] * 2
    with pytest.raises(ValueError, match="output_fmt: got 'NHWC'"):
        model.forward_intermediates(images, output_fmt='NHWC')
    assert len(create_model('test_refiner_vit', features_only=True)(torch.randn(1, 3, 64, 64))) == 3


def test_attention_to_look_at():
    model = small().double()
    reference = Reference(randomise(model), 4)
    images = keyed('image', (2, 3, 64, 64))
    x = reference.patches(images).flatten(2).transpose(1, 2)
    x = torch.cat([reference['cls_token'].expand(2, -1, -1), x], 1) + reference['pos_embed']
    maps, expected = None, []
    for i in range(4):
        x, maps = reference.block(f'blocks.{i}.', x, maps)
        expected.append(maps if i % 2 == 0 else reference.refine(f'blocks.{i}.attn.', maps, 16))
    found = model.forward_intermediates(images, return_attention=True, intermediates_only=True)
    for (_, attention), y in zip(found, expected, strict=True):
        assert_near(attention, y, 1e-11)
    (feature, token, attention), = model.forward_intermediates(
        images, indices=[2], return_attention=True, return_prefix_tokens=True, stop_early=True,
        intermediates_only=True)
    assert_near(attention, expected[2], 1e-11)
    assert_near(attention.sum(-1), torch.full((2, 4, 65), 1 + 16 ** -.5).double(), 1e-12)


def test_both_classifiers_are_reset():
    model = small().double()
    model.reset_classifier(3)
    assert model.head.out_features == model.aux_head.out_features == 3 and not model.aux_head.training
    assert model.aux_head.weight.dtype == torch.float64
    model.reset_classifier(0)
    assert model.aux_head is None and model(torch.randn(1, 3, 64, 64).double()).shape == (1, 64)
    with pytest.raises(ValueError, match="global_pool: got 'max'"):
        model.reset_classifier(3, 'max')


def test_pools():
    model = small(global_pool='avg', use_aux_head=False)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert_near(model(images), model.head(model.forward_features(images)[:, 1:].mean(1)), 1e-5)
    assert small(global_pool='')(images).shape == (2, 65, 10)
    with pytest.raises(ValueError, match='forward_train'):
        small(global_pool='').forward_train(images)


def test_layers_of_layer_decay():
    from timm.optim import create_optimizer_v2
    model = small()
    optimizer = create_optimizer_v2(model, 'adamw', lr=1e-3, weight_decay=.05, layer_decay=.5)
    scale = {p: g['lr_scale'] for g in optimizer.param_groups for p in g['params']}
    decay = {p: g['weight_decay'] for g in optimizer.param_groups for p in g['params']}
    names = dict(model.named_parameters())
    order = ['patch_embed.proj.weight', 'blocks.0.attn.qkv.weight', 'blocks.1.attn.refine.conv.weight', 'head.weight']
    scales = [scale[names[n]] for n in order]
    assert scales == sorted(scales) and len(set(scales)) == 4 and len(scale) == len(names)
    assert decay[names['pos_embed']] == decay[names['cls_token']] == decay[names['blocks.0.ls2.gamma']] == 0.


@pytest.mark.parametrize('kwargs,message', [
    (dict(num_heads=5), 'num_heads: got 5'),
    (dict(depth=0), 'depth: got 0'),
    (dict(stem_dims=(8, 8)), 'stem_dims: got 2'),
    (dict(refine_ratio=.1), 'ratio'),
    (dict(global_pool='map'), 'global_pool: got'),
])
def test_bad_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        small(**kwargs)


# memory, and learning


def test_stem_is_folded_in_inference():
    model = small().double()
    stem = model.patch_embed
    for bn in (stem.bn1, stem.bn2, stem.bn3):
        for x in (bn.weight.data, bn.bias.data, bn.running_mean):
            x.add_(.3 * torch.randn_like(x))
        bn.running_var.uniform_(.5, 2.)
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    calls = []
    stem.bn1.forward, plain = lambda x: calls.append(x.shape) or plain(x), stem.bn1.forward
    expected = stem(images)
    assert len(calls) == 1
    with torch.no_grad():
        assert_near(stem(images), expected, 1e-12)
        assert len(calls) == 1  # none of the norms ran
        stem.train()
        stem(images)
        assert len(calls) == 2
        handle = stem.eval().bn1.register_forward_hook(lambda module, args, out: 2 * out)
        assert max_error(stem(images), expected) > .01
        handle.remove()


def test_inference_keeps_no_expanded_map():
    """The largest tensor is a map of all heads."""
    from torch.utils._python_dispatch import TorchDispatchMode
    model = small(img_size=320, depth=2).requires_grad_(False)  # 1601 tokens: strips are 28 rows of them
    size = 4 * 1601 * 1601
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out._base is None:
                largest = max(largest, out.numel())
            return out

    with torch.no_grad(), Watch():
        model(torch.randn(1, 3, 320, 320))
    assert largest == size
    set_lean(model, False)
    largest = 0
    with torch.no_grad(), Watch():
        model(torch.randn(1, 3, 320, 320))
    assert largest == 3 * size
