"""ELSA-Swin under the demands that timm's tests make of its own Swin family, by name.

The tests that timm runs for every registered model are in tests/timm_suite. Those here are the ones that timm writes
for named models, put anew for ours. ELSA blocks have no windows: only the last stage holds window attention.
"""
import copy
import importlib
import io

import pytest
import torch
from timm import create_model
from timm.layers import set_scriptable
from timm.models._features import FeatureGetterNet, FeatureHookNet
from timm.models._manipulate import reinit_non_persistent_buffers
from timm.models.swin_transformer import resolve_stage_window_sizes

import elsa_models  # noqa: F401  registers the models

IMG_SIZE = 224
NUM_STAGES = 4


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def _create(**kwargs):
    # a last stage of two blocks, the second of which shifts its windows where they do not cover the map
    settings = dict(img_size=IMG_SIZE, window_size=7, depths=(1, 1, 2, 2), num_classes=5)
    return create_model('test_elsa_swin', **dict(settings, **kwargs)).eval()


def _window_blocks(model):
    """(stage index, attention) of every block that attends within windows; there is always one."""
    blocks = [
        (i, b.attn) for i, stage in enumerate(model.layers) for b in stage.blocks if hasattr(b.attn, 'window_size')]
    assert blocks
    return blocks


def _masks(model):
    return {name: mask for name, mask in model.named_buffers() if name.endswith('attn_mask')}


def _structure(model):
    windows = [(b.window_size, b.shift_size) for _, b in _window_blocks(model)]
    return windows, {k: v.shape for k, v in model.state_dict().items()}


def _state(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def _assert_same_state(model, state):
    assert model.state_dict().keys() == state.keys()
    for k, v in model.state_dict().items():
        assert torch.equal(v, state[k]), k


def _assert_windows(model, window_size):
    """The window of every stage is as specified, cut where the feature map of the stage is smaller."""
    window_size = resolve_stage_window_sizes(window_size, NUM_STAGES)
    for stage, block in _window_blocks(model):
        assert block.window_size == tuple(map(min, window_size[stage], block.feat_size))


def _checkpoint_filter(model):
    return importlib.import_module(type(model).__module__).checkpoint_filter_fn


def _double(window_size):
    return 2 * window_size if isinstance(window_size, int) else tuple(_double(w) for w in window_size)


# reset and reload


@pytest.mark.parametrize('window_size', [7, 4])
def test_buffers_reinit_after_to_empty(window_size):
    # buffers that no checkpoint holds (relative position index, shift mask) are computed anew on request
    model = _create(window_size=window_size)
    empty = _create(window_size=window_size, device='meta').to_empty(device='cpu')
    with torch.no_grad():
        for tensor in empty.buffers():
            tensor.fill_(float('nan') if tensor.is_floating_point() else 0)
    empty.load_state_dict(model.state_dict())
    reinit_non_persistent_buffers(empty)
    assert bool(_masks(model)) == (window_size == 4)
    x = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        torch.testing.assert_close(empty(x), model(x), rtol=0, atol=0)


def test_headless_checkpoint_reload():
    # without a classifier it is still a checkpoint in timm's names, whatever the order of its entries
    model = _create(num_classes=0)
    reloaded = _create(num_classes=0)
    state_dict = dict(sorted(model.state_dict().items()))
    reloaded.load_state_dict(_checkpoint_filter(model)(state_dict, reloaded))
    x = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(x), model(x), rtol=0, atol=0)


@pytest.mark.parametrize('window_size', [7, (7, 9)])
def test_non_square_checkpoint_reload(window_size):
    # at the size it was saved at, a checkpoint goes through the filter unchanged
    kwargs = dict(img_size=(224, 288), window_size=window_size)
    model = _create(**kwargs)
    reloaded = _create(**kwargs)
    state_dict = _checkpoint_filter(model)(_state(model), reloaded)
    _assert_same_state(model, state_dict)
    reloaded.load_state_dict(state_dict)
    x = torch.randn(1, 3, 224, 288)
    with torch.no_grad():
        torch.testing.assert_close(reloaded(x), model(x), rtol=0, atol=0)


def test_checkpoint_filter_agrees_with_set_input_size():
    # weights may reach another resolution by either way: into a larger model, or in a model that then grows
    model = _create()
    size = IMG_SIZE * 2
    larger = _create(img_size=size, window_size=14)
    larger.load_state_dict(_checkpoint_filter(model)(model.state_dict(), larger))
    model.set_input_size(img_size=(size, size))
    x = torch.randn(1, 3, size, size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), larger(x))

    # what is recomputed after a cast has the dtype of the model
    model = model.to(torch.bfloat16)
    model.set_input_size(img_size=(IMG_SIZE, IMG_SIZE))
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if tensor.is_floating_point():
            assert tensor.dtype == torch.bfloat16, name
    with torch.no_grad():
        assert model(torch.randn(1, 3, IMG_SIZE, IMG_SIZE, dtype=torch.bfloat16)).dtype == torch.bfloat16


# change of the input size


def test_non_square_resize_chain():
    # each step starts from the table of the last one, which need not be square
    model = _create()
    for size in [(224, 288), (288, 224), (224, 224)]:
        model.set_input_size(img_size=size)
        _assert_windows(model, (size[0] // 32, size[1] // 32))
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(1, 3, *size))).all()


def test_set_input_size():
    # cast before the resize: the mask that the larger feature map needs must have the dtype of the model
    model = _create(window_size=4).to(torch.bfloat16)
    size = (IMG_SIZE * 2, IMG_SIZE * 2)
    model.set_input_size(img_size=size, window_size=4)
    assert _masks(model)
    for name, mask in _masks(model).items():
        assert mask.dtype == torch.bfloat16, name
    model = model.float()
    expected = _create(img_size=size, window_size=4)
    expected.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected(x))


def test_set_window_size():
    # a smaller window on the same map: shifted blocks get a mask that they did not have
    model = _create()
    assert not _masks(model)
    model.set_input_size(window_size=4)
    assert all(b.window_size == (4, 4) for _, b in _window_blocks(model))
    assert _masks(model)
    with torch.no_grad():
        assert torch.isfinite(model(torch.randn(1, 3, IMG_SIZE, IMG_SIZE))).all()


def test_always_partition():
    # windows shift even where one of them covers the whole map
    model = _create()
    assert not any(any(b.shift_size) for _, b in _window_blocks(model))
    model.set_input_size(img_size=(IMG_SIZE, IMG_SIZE), always_partition=True)
    assert any(any(b.shift_size) for _, b in _window_blocks(model))
    reference = _create(always_partition=True)
    assert _structure(model) == _structure(reference)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))


@pytest.mark.parametrize('spec', [
    None,
    14,
    (7, 7, 14, 4),
    ((7, 4), (14, 7), (7, 14), (4, 7)),
], ids=['default', 'uniform', 'per_stage', 'non_square'])
def test_stage_windows(spec):
    model = _create(**({} if spec is None else dict(window_size=spec)))
    spec = 7 if spec is None else spec
    _assert_windows(model, spec)
    x = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    state, structure = _state(model), _structure(model)
    with torch.no_grad():
        expected = model(x)

    # at the current size nothing changes, to the bit
    for kwargs in [dict(), dict(img_size=(IMG_SIZE, IMG_SIZE))]:
        model.set_input_size(**kwargs)
        assert _structure(model) == structure
        _assert_same_state(model, state)
        with torch.no_grad():
            torch.testing.assert_close(model(x), expected, rtol=0, atol=0)

    # windows grow with the map: the model is the one that would have been built at that size
    size = (IMG_SIZE * 2, IMG_SIZE * 2)
    model.set_input_size(img_size=size)
    reference = _create(img_size=size, window_size=_double(spec))
    _assert_windows(model, _double(spec))
    assert _structure(model) == _structure(reference)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        torch.testing.assert_close(model(x), reference(x))
    model.set_input_size(img_size=(IMG_SIZE, IMG_SIZE))
    assert _structure(model) == structure

    # windows that are given hold as given, and later calls start from them
    windows = (14, 14, 28, 8)
    reference = _structure(_create(img_size=size, window_size=windows))
    model.set_input_size(img_size=size, window_size=windows)
    _assert_windows(model, windows)
    assert _structure(model) == reference
    model.set_input_size()
    assert _structure(model) == reference

    # one ratio for all stages divides the patch grid
    model.set_input_size(img_size=(IMG_SIZE, IMG_SIZE), window_ratio=8)
    assert _structure(model) == _structure(_create(window_size=7))


@pytest.mark.parametrize('as_type', [tuple, list])
def test_window_ratios(as_type):
    # ratios divide the patch grid, (64, 80) at this size, and outlive the call
    window_ratio = as_type((8, 8, 4, 16))
    windows = ((8, 10), (8, 10), (16, 20), (4, 5))
    turned = ((10, 8), (10, 8), (20, 16), (5, 4))
    model = _create()
    model.set_input_size(img_size=(256, 320), window_ratio=window_ratio)
    for size, size_windows in [((256, 320), windows), ((320, 256), turned)]:
        model.set_input_size(img_size=size)
        _assert_windows(model, size_windows)
        reference = _create(img_size=size, window_size=size_windows)
        assert _structure(model) == _structure(reference)
        reference.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(model(x), reference(x))

    # of both, the window size counts
    model.set_input_size(window_size=3, window_ratio=window_ratio)
    _assert_windows(model, 3)


@pytest.mark.parametrize('kwargs', [
    dict(window_ratio=(8, 4)),
    dict(window_ratio=0),
    dict(window_size=(7, 7, 7)),
    dict(window_size=0),
], ids=str)
def test_invalid_windows_change_nothing(kwargs):
    model = _create()
    state, structure = _state(model), _structure(model)
    x = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        expected = model(x)
    with pytest.raises((AssertionError, ValueError)):
        model.set_input_size(img_size=(IMG_SIZE * 2, IMG_SIZE * 2), **kwargs)
    assert model.patch_embed.img_size == (IMG_SIZE, IMG_SIZE)
    assert _structure(model) == structure
    _assert_same_state(model, state)
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)


def test_smallest_windows():
    # 32 x 32 pixels leave a single position in the last stage
    model = _create()
    for size, kwargs in [((64, 64), dict(window_ratio=32)), ((32, 32), dict())]:
        model.set_input_size(img_size=size, **kwargs)
        assert all(w >= 1 for _, b in _window_blocks(model) for w in b.window_size)
        with torch.no_grad():
            assert torch.isfinite(model(torch.randn(1, 3, *size))).all()


def test_resize_metadata():
    # a feature wrapper made before the resize reports the strides after it
    model = _create(img_size=(64, 96), patch_size=2, window_size=4)
    features = FeatureGetterNet(model, out_indices=(0, 1, 2, 3)).eval()
    for size, patch_size in [((64, 96), 2), ((96, 128), 4), ((64, 96), 2)]:
        model.set_input_size(img_size=size, patch_size=patch_size)
        grid_size = tuple(s // patch_size for s in size)
        assert model.patch_embed.img_size == size
        assert model.patch_embed.grid_size == grid_size
        assert model.patch_embed.num_patches == grid_size[0] * grid_size[1]
        reductions = [patch_size * 2 ** i for i in range(NUM_STAGES)]
        assert features.feature_info.reduction() == reductions
        with torch.no_grad():
            outputs = features(torch.randn(1, 3, *size))
        assert [tuple(o.shape[-2:]) for o in outputs] == [tuple(s // r for s in size) for r in reductions]


def test_odd_stage_sizes():
    # 232 x 248 gives 58 x 62, 29 x 31, 15 x 16 and 8 x 8: patch merging rounds up
    model = _create(window_size=7)
    for size in [(232, 248), (248, 232), (224, 224)]:
        model.set_input_size(img_size=size, window_size=7)
        reference = _create(img_size=size, window_size=7)
        dynamic = _create(img_size=size, window_size=7, strict_img_size=False)
        reference.load_state_dict(model.state_dict())
        dynamic.load_state_dict(model.state_dict())
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            output, features = model.forward_intermediates(x)
            torch.testing.assert_close(output, reference.forward_features(x))
            torch.testing.assert_close(output, dynamic.forward_features(x))
        grid_sizes = [tuple(-(-s // 2 ** (i + 2)) for s in size) for i in range(NUM_STAGES)]
        assert [tuple(f.shape[-2:]) for f in features] == grid_sizes
        for stage, block in _window_blocks(model):
            assert block.feat_size == grid_sizes[stage]


def test_set_input_size_dtype():
    # the patch projection that another patch size brings has the dtype of the model, and the same size is a no-op
    model = _create().to(torch.bfloat16)
    state = _state(model)
    model.set_input_size()
    _assert_same_state(model, state)
    model.set_input_size(img_size=(112, 112), patch_size=2)
    assert model.patch_embed.proj.weight.dtype == torch.bfloat16
    with torch.no_grad():
        output = model(torch.randn(1, 3, 112, 112, dtype=torch.bfloat16))
    assert output.dtype == torch.bfloat16 and output.shape == (1, 5)


def test_dtype_change_after_forward():
    # nothing computed by the first forward may outlive the cast
    model = _create(window_size=4, strict_img_size=False)
    x = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        model(x)
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).dtype == torch.bfloat16
        fresh = _create(window_size=4, strict_img_size=False).double()
        fresh.load_state_dict(model.double().state_dict())
        torch.testing.assert_close(model(x.double()), fresh(x.double()), rtol=0, atol=0)


def test_set_input_size_after_pruning():
    # two stages are left, so there are two windows to give, none of them in use without the last stage
    model = _create(img_size=(64, 96))
    model.prune_intermediate_layers(indices=[0, 1], prune_norm=True)
    for kwargs in [
        dict(window_size=4),
        dict(window_size=((2, 4), (4, 2))),
        dict(window_ratio=8),
        dict(window_ratio=(8, 4)),
        dict(),
    ]:
        model.set_input_size(img_size=(96, 128), **kwargs)
        with torch.no_grad():
            features = model.forward_intermediates(torch.randn(1, 3, 96, 128), intermediates_only=True)
        assert [tuple(f.shape[-2:]) for f in features] == [(24, 32), (12, 16)]
        assert all(torch.isfinite(f).all() for f in features)
    with pytest.raises((AssertionError, ValueError)):
        model.set_input_size(window_size=(4, 4, 4, 4))


def test_script_after_resize():
    model = _create(img_size=(64, 96), window_size=(2, 3))
    first = torch.jit.script(model)
    for kwargs in [dict(window_ratio=(8, 8, 4, 8)), dict(window_size=2), dict(window_size=1)]:
        model.set_input_size(img_size=(96, 128), **kwargs)
        scripted = torch.jit.script(model)
        buffer = io.BytesIO()
        torch.jit.save(scripted, buffer)
        buffer.seek(0)
        reloaded = torch.jit.load(buffer)
        x = torch.randn(1, 3, 96, 128)
        with torch.no_grad():
            expected = model(x)
            torch.testing.assert_close(scripted(x), expected)
            torch.testing.assert_close(reloaded(x), expected)
    # a script holds the geometry it was made with
    assert first.patch_embed.img_size == (64, 96)
    assert not hasattr(first, 'set_input_size')


def test_compile_recompiles_on_resize_only():
    model = _create(img_size=(64, 96), window_size=(2, 3))
    graphs = []

    def _count(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(model, backend=_count, fullgraph=True)
    for kwargs, size, num_graphs in [
        (None, (64, 96), 1),
        (dict(), (64, 96), 1),
        (dict(img_size=(96, 128), window_ratio=(8, 8, 4, 8)), (96, 128), 2),
        (dict(window_size=2), (96, 128), 3),
    ]:
        if kwargs is not None:
            compiled.set_input_size(**kwargs)
        x = torch.randn(1, 3, *size)
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), model(x))
        assert len(graphs) == num_graphs


@pytest.mark.parametrize('img_size', [224, (224, 288)])
def test_window_padding(img_size):
    # 7 x 7 and 7 x 9 are no multiples of 4: the mask made ahead must be the one made on the way
    static = _create(img_size=img_size, window_size=4)
    dynamic = _create(img_size=img_size, window_size=4, strict_img_size=False)
    dynamic.load_state_dict(static.state_dict())
    assert _masks(static)
    x = torch.randn(1, 3, *static.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(static(x), dynamic(x))


@pytest.mark.parametrize('window_size', [7, 4])
def test_dynamic_size_trace(window_size):
    # traced at one size and run at another: no size may be frozen in the trace
    model = _create(window_size=window_size, strict_img_size=False)
    traced = torch.jit.trace(model, torch.randn(1, 3, IMG_SIZE, IMG_SIZE), check_trace=False)
    x = torch.randn(1, 3, 224, 320)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), model(x))


# features


@pytest.mark.parametrize('out_indices', [(0,), (3,), (0, 1, 2)])
def test_features_script(out_indices):
    model = _create(img_size=64, features_only=True, feature_cls='getter', out_indices=out_indices).eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert len(expected) == len(out_indices)
        torch.testing.assert_close(torch.jit.script(model)(x), expected)


def test_features_fx_script():
    with set_scriptable(True):
        model = _create(img_size=64, features_only=True, feature_cls='fx').eval()
    x = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        expected = model(x)
        outputs = torch.jit.script(model)(x)
    assert isinstance(outputs, list)
    torch.testing.assert_close(outputs, expected)


def test_feature_class_given_as_class():
    # options of the default wrapper that another one does not know are dropped, as for its name
    model = _create(features_only=True, feature_cls=FeatureGetterNet)
    assert isinstance(model, FeatureGetterNet)


@pytest.mark.parametrize('indices,prune_norm', [([0], False), ([3], False), ([0, 1, 2, 3], True)])
def test_pruned_model_uses_all_parameters(indices, prune_norm):
    # an idle parameter would stall distributed training
    model = _create(img_size=96, drop_rate=0.5)
    x = torch.randn(2, 3, 96, 96)
    pruned = copy.deepcopy(model).train()
    take_indices = pruned.prune_intermediate_layers(indices, prune_norm=prune_norm)
    features = pruned.forward_intermediates(x, indices=take_indices, norm=not prune_norm, intermediates_only=True)
    sum(f.sum() for f in features).backward()
    assert not [n for n, p in pruned.named_parameters() if p.grad is None]

    # a head that pruning puts in place of the old one does not drop out in eval mode
    pruned = copy.deepcopy(model).eval()
    pruned.prune_intermediate_layers(indices, prune_norm=prune_norm)
    with torch.no_grad():
        assert torch.equal(pruned(x), pruned(x))


def test_stop_early_final_norm():
    # the final norm follows the last stage, and no other
    model = _create()
    with torch.no_grad():
        # fresh norm weights would hide a norm too many
        for p in model.norm.parameters():
            p.uniform_(0.5, 1.5)
    x = torch.randn(1, 3, IMG_SIZE, IMG_SIZE)
    with torch.no_grad():
        _, intermediates = model.forward_intermediates(x)
        for norm in (False, True):
            _, selected = model.forward_intermediates(x, indices=[0], norm=norm, stop_early=True)
            torch.testing.assert_close(selected[0], intermediates[0], rtol=0, atol=0)


def test_forward_after_pruning():
    model = _create(img_size=128)
    x = torch.randn(1, 3, 128, 128)
    for index in range(NUM_STAGES):
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([index], prune_norm=True)
        with torch.no_grad():
            final, intermediates = pruned.forward_intermediates(x, indices=[index])
            features = pruned.forward_features(x)
            torch.testing.assert_close(features, final, rtol=0, atol=0)
            torch.testing.assert_close(features, intermediates[0].permute(0, 2, 3, 1), rtol=0, atol=0)
            assert pruned(x).shape == features.shape
        pruned.train().forward_features(x).sum().backward()
        assert not [n for n, p in pruned.named_parameters() if p.grad is None]


def test_prune_last_feature():
    model = _create(img_size=96)
    x = torch.randn(1, 3, 96, 96)
    last = NUM_STAGES - 1
    with torch.no_grad():
        expected = model(x)
        tap = model.forward_intermediates(x, indices=[last], intermediates_only=True)[0]
        final, _ = model.forward_intermediates(x, indices=[last], stop_early=True)
        torch.testing.assert_close(final, model.forward_features(x), rtol=0, atol=0)

        # at the last stage there is nothing but the head to prune
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([last], prune_head=False)
        torch.testing.assert_close(pruned(x), expected, rtol=0, atol=0)

        # a norm that is gone is not asked for
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([last], prune_norm=True)
        selected = pruned.forward_intermediates(x, indices=[last], norm=True, intermediates_only=True)
        torch.testing.assert_close(selected[0], tap, rtol=0, atol=0)

        # a head put back pools what the last stage left gives
        pruned = copy.deepcopy(model)
        pruned.prune_intermediate_layers([last - 1])
        pruned.reset_classifier(0, 'avg')
        torch.testing.assert_close(pruned(x), pruned.forward_features(x).mean((1, 2)))


@pytest.mark.parametrize('feature_cls', [None, 'getter'])
def test_features_grad_checkpointing_backward(feature_cls):
    # how detectors train a backbone: recomputed activations give the same gradients
    kwargs = dict(img_size=64, features_only=True, **({} if feature_cls is None else dict(feature_cls=feature_cls)))
    x = torch.randn(2, 3, 64, 64)
    grads = []
    for grad_checkpointing in (False, True):
        torch.manual_seed(0)
        model = _create(**kwargs).train()
        getattr(model, 'model', model).set_grad_checkpointing(grad_checkpointing)  # the getter wraps the model
        torch.manual_seed(1)
        sum(f.pow(2).mean() for f in model(x)).backward()
        grads.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys() and grads[0]
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, msg=name)


def test_feature_hooks_grad_checkpointing():
    # recomputation in backward fires the hooks again, which must not show in the next forward
    model = _create(img_size=64, drop_path_rate=0., features_only=True, feature_cls='hook').train()
    assert isinstance(model, FeatureHookNet)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
    assert len(expected) == NUM_STAGES
    model.set_grad_checkpointing(True)
    for _ in range(2):
        outputs = model(x)
        torch.testing.assert_close(outputs, expected)
        sum(o.mean() for o in outputs).backward()


# head


def test_reset_classifier_keeps_pool():
    model = _create(img_size=64, global_pool='max')
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
        model.reset_classifier(7)
        torch.testing.assert_close(model.forward_head(model.forward_features(x), pre_logits=True), expected)
        assert model(x).shape == (2, 7)
        model.reset_classifier(7, 'avg')
        pooled = model.forward_head(model.forward_features(x), pre_logits=True)
        assert not torch.allclose(pooled, expected)


def test_head_hidden_size():
    model = _create(img_size=64, num_classes=0)
    x = torch.randn(2, 3, 64, 64)

    def _check_width(num_classes):
        features = model.forward_features(x)
        assert model.forward_head(features, pre_logits=True).shape[1] == model.head_hidden_size
        assert model(x).shape[1] == (num_classes or model.head_hidden_size)

    with torch.no_grad():
        _check_width(0)
        model.reset_classifier(7, 'avg')
        _check_width(7)
        # without the last stage, the head is as wide as the tap
        width = model.feature_info[NUM_STAGES - 2]['num_chs']
        model.prune_intermediate_layers([NUM_STAGES - 2], prune_norm=True)
        model.reset_classifier(7, 'avg')
        _check_width(7)
        assert model.head_hidden_size == width


@pytest.mark.parametrize('at_once', [True, False])
def test_concat_pooling(at_once):
    # the mean and the maximum of each channel, and a classifier of twice the width
    model = _create(img_size=64, **(dict(global_pool='catavgmax') if at_once else {}))
    if not at_once:
        model.reset_classifier(5, 'catavgmax')
    width = model.num_features
    assert model.head_hidden_size == model.get_classifier().in_features == 2 * width
    with torch.no_grad():
        features = model.forward_features(torch.randn(2, 3, 64, 64))
        pooled = model.forward_head(features, pre_logits=True)
        assert torch.equal(pooled, torch.cat([features.mean((1, 2)), features.amax((1, 2))], 1))
        assert torch.equal(model.forward_head(features), model.get_classifier()(pooled))


# the whole model
