"""What every registered model of this package does, whatever its family.

Nothing here knows a family by name. The models are found in timm's registry, and what may differ between them they say
themselves: whether they are built for one image size (`fixed_input_size` of their pretrained_cfg), where their features
are (`feature_info`), in which layout (`output_fmt`), where their classifier and their first convolution are.

The small models, `test_*`, are tested by default; `-m slow` tests every size, on small images.
"""
import copy
import csv
import math
import pickle
import pkgutil
import subprocess
import sys
from collections import Counter

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import DATA, assert_near, learn_digits, max_error
from timm import create_model
from timm.models import group_parameters, model_entrypoint, save_for_hf
from timm.models._features_fx import GraphExtractNet, get_graph_node_names
from timm.models._input import get_model_input_config
from timm.models.byobnet import ByobNet
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from torch.nn.attention import SDPBackend, sdpa_kernel

import elsa_models
from elsa_models.export.rewrite import rewrite_for_runtimes
from elsa_models.models import families, family_of, token_label_loss
from elsa_models.models._family import arguments_of
from elsa_models.models._token_labels import TokenLabelModel

# what no runtime but PyTorch's own runs well, or at all
REFUSED_OPERATORS = {'Col2Im', 'If', 'Loop', 'Scan', 'ScatterND', 'ScatterElements'}
LARGEST = 96  # pixels of an image in the tests of models that are not small

WITH_KERNELS = ('test_any_size', 'test_every_parameter_learns', 'test_learns_a_batch', 'test_learns_the_digits')


@pytest.fixture(autouse=True)
def operators(request):
    """PyTorch's own, but where a test stands for use."""
    if request.function.__name__ not in WITH_KERNELS:
        request.getfixturevalue('pytorchs_operators')


def own_models():
    """Names of all models that the package registers."""
    return [n for n in timm.list_models() if model_entrypoint(n).__module__.partition('.')[0] == elsa_models.__name__]


def is_small(name):
    """Whether a model is made for tests."""
    return name.startswith('test_')


NAMES = own_models()
every_model = pytest.mark.parametrize(
    'name', [n if is_small(n) else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])


def config(name):
    return create_model(name, device='meta').pretrained_cfg


def takes_one_size(name):
    """Whether models of this name are built for one image size, and take others only when told."""
    return bool(config(name).get('fixed_input_size'))


def side(name):
    """Pixels of a side of the images in these tests."""
    size = min(config(name)['input_size'][1:])
    return size if is_small(name) else min(size, LARGEST)


def sizes(name):
    """Heights and widths: a square, rectangles both ways, sides that nothing divides."""
    s = side(name)
    return [(s, s), (s + s // 2, s), (s - 1, s + 7), (s // 2 + 1, 2 * s + 2)]


def make(name, size=None, **kwargs):
    """A model for images of one size, in evaluation mode."""
    if takes_one_size(name):
        kwargs = dict(img_size=size or side(name), **kwargs)
    return create_model(name, **kwargs).eval()


def make_flexible(name, **kwargs):
    """A model for images whose size is decided by each batch."""
    return make(name, **(dict(dynamic_img_size=True) if takes_one_size(name) else {}), **kwargs)


def randomise(model):
    """Weights and statistics with which every part shows in the output."""
    change = change_of(model)
    with torch.no_grad():
        for p in model.parameters():
            p.add_((.3 * change if p.dim() == 1 else .08) * torch.randn_like(p))
    config = get_model_input_config(model)
    channels, *size = config['input_size']
    if not config['fixed_input_size']:
        size = [min(s, LARGEST) for s in size]
    return settle(model, size, channels)


def batch_norms(model):
    return [m for m in model.modules() if getattr(m, 'running_var', None) is not None]


def change_of(model):
    """Part of a change of each norm that a model bears: in a deep ResNet each block adds to what others are off by."""
    deep = isinstance(model, ByobNet) and not is_small(model.pretrained_cfg['architecture'])
    return 10 / len(batch_norms(model)) if deep else 1.


@torch.no_grad()
def settle(model, size, channels=3):
    """Statistics about those of these weights: where attention has no softmax, nothing else bounds the output."""
    norms, change = batch_norms(model), change_of(model)
    if norms:
        elsa_models.reestimate_batch_norm(model, [torch.randn(8, channels, *size).to(next(model.parameters()))])
    for norm in norms:
        norm.running_mean.add_(.1 * change * norm.running_var.sqrt() * torch.randn_like(norm.running_mean))
        norm.running_var.mul_(torch.empty_like(norm.running_var).uniform_(.8, 1.25) ** change)
    return model


def images(name, batch=2, size=None, dtype=torch.float32):
    return torch.randn(batch, 3, *(size or (side(name),) * 2), dtype=dtype)


def num_parameters(model):
    return sum(p.numel() for p in model.parameters())


def train_step(model, x):
    """Output of one pass in training mode, and the gradient of every parameter, None where there is none."""
    model.train().zero_grad()
    torch.manual_seed(1)  # of drop path
    y = model(x)
    y.backward(torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
    return y.detach(), {name: p.grad for name, p in model.named_parameters()}


# registration


def test_models_are_found():
    assert len(NAMES) == len(set(NAMES)) >= 2


def test_every_module_has_a_small_model():
    modules = {model_entrypoint(n).__module__ for n in NAMES}
    small = {model_entrypoint(n).__module__ for n in NAMES if is_small(n)}
    assert modules == small


def test_importing_the_package_takes_nothing_from_timm():
    # timm keys its registry on the last part of a module's path, and on the name of an entry point
    code = (
        'import timm\n'
        'models = {n: timm.models.model_entrypoint(n).__module__ for n in timm.list_models()}\n'
        'modules = {m: timm.list_models(module=m) for m in timm.list_modules()}\n'
        'import elsa_models\n'
        'assert all(timm.models.model_entrypoint(n).__module__ == m for n, m in models.items())\n'
        'assert all(timm.list_models(module=m) == names for m, names in modules.items())\n'
        'assert not {m.rpartition(".")[2] for m in sys.modules if m.startswith("elsa_models.")} & set(modules)\n'
    )
    subprocess.run([sys.executable, '-c', 'import sys\n' + code], check=True)


def test_every_file_of_models_is_a_family_whose_class_is_exported():
    files = {m.name for m in pkgutil.iter_modules(elsa_models.models.__path__) if not m.name.startswith('_')}
    own = [f for f in families() if f.module.startswith(elsa_models.__name__ + '.')]
    assert {f.module.rpartition('.')[2] for f in own} == files
    for family in own:
        assert getattr(elsa_models.models, family.model_cls.__name__, None) is family.model_cls
        assert family.model_names


@every_model
def test_entry_point(name):
    entry_point = model_entrypoint(name)
    module = entry_point.__module__.rpartition('.')[2]
    assert name in timm.list_models(module=module)
    assert name not in timm.list_modules()
    assert entry_point.__name__ == name and len((entry_point.__doc__ or '').strip()) > 20
    model = create_model(name, device='meta')
    assert model.pretrained_cfg['architecture'] == name
    assert type(model).__module__.startswith(elsa_models.__name__)
    assert is_small(name) == (num_parameters(model) < 1_500_000)


@every_model
def test_unknown_argument(name):
    with pytest.raises(TypeError, match='kernel_sise'):
        create_model(name, device='meta', kernel_sise=5)


def recorded_parameters():
    with open(DATA / 'parameters.csv', newline='') as file:
        return {row['model']: int(row['parameters']) for row in csv.DictReader(file)}


@pytest.mark.parametrize('name', NAMES)
def test_number_of_parameters(name):
    """A new model adds its line to the table, which is how a change of what is there gets noticed."""
    counted = num_parameters(create_model(name, device='meta'))
    recorded = recorded_parameters().get(name)
    assert counted == recorded, f'the line of tests/data/parameters.csv would be: {name},{counted}'


def test_the_table_of_parameters_names_no_other_model():
    rows = (DATA / 'parameters.csv').read_text().splitlines()[1:]
    assert rows == sorted(rows) and set(recorded_parameters()) <= set(NAMES)


# sizes


@every_model
def test_any_size(name):
    model = randomise(make_flexible(name, num_classes=5))
    for size in sizes(name):
        if change_of(model) < 1.:
            settle(model, size)  # those of another size are too far off
        y = model(images(name, size=size))
        assert y.shape == (2, 5) and y.isfinite().all()


@every_model
def test_input_size_can_be_set(name, tmp_path):
    model = randomise(make(name, num_classes=5)).double()
    flexible = make_flexible(name, num_classes=5).double()
    flexible.load_state_dict(model.state_dict())
    x = images(name, dtype=torch.float64)
    assert_near(flexible(x), model(x), 1e-10)
    if not takes_one_size(name):
        return
    state, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    model.set_input_size(img_size=side(name))  # the size that it has
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    for i, size in enumerate(sizes(name)[1:]):
        x = images(name, size=size, dtype=torch.float64)
        with pytest.raises((ValueError, AssertionError)):
            model(x)
        resized = copy.deepcopy(model)
        resized.set_input_size(img_size=size)
        y = resized(x)
        assert y.shape == (2, 5) and y.isfinite().all()
        # what is saved says which size it is for
        save_for_hf(resized, tmp_path / str(i), safe_serialization=True)
        built = create_model(f'local-dir:{tmp_path / str(i)}', pretrained=True).eval().double()
        assert_near(built(x), y, 1e-10)
        # back again, everything but resampled tables is as it was
        resized.set_input_size(img_size=side(name))
        for k, v in model.state_dict().items():
            assert resized.state_dict()[k].shape == v.shape, k


@every_model
def test_empty_batch(name):
    model = make(name, num_classes=5)
    x = images(name, 0).requires_grad_()
    y = model(x)
    assert y.shape == (0, 5)
    y.sum().backward()
    assert x.grad.shape == x.shape


@every_model
def test_images_that_are_not_contiguous(name):
    model = randomise(make(name, num_classes=5)).double()
    x = images(name, dtype=torch.float64)
    y = model(x)
    assert_near(model(x.to(memory_format=torch.channels_last)), y, 1e-10)
    wide = torch.stack([x, torch.zeros_like(x)], dim=-1)
    assert_near(model(wide[..., 0]), y, 1e-10)


# features


@every_model
def test_features_have_their_strides(name):
    model = make_flexible(name, features_only=True, **family_of(name).dense_args)  # as a detector's backbone
    strides, channels = model.feature_info.reduction(), model.feature_info.channels()
    assert strides == sorted(strides) and len(strides) == len(channels) >= 3
    channels_last = str(getattr(model, 'output_fmt', 'NCHW')) in ('NHWC', 'Format.NHWC')
    for size in sizes(name):
        maps = model(images(name, size=size))
        assert len(maps) == len(strides)
        for m, stride, width in zip(maps, strides, channels, strict=True):
            m = m.permute(0, 3, 1, 2) if channels_last else m
            assert m.shape == (2, width, *(math.ceil(s / stride) for s in size))


@every_model
def test_features_are_the_intermediates(name, tmp_path):
    model = randomise(make(name)).double()
    path = tmp_path / 'model.pth'
    torch.save(model.state_dict(), path)
    x = images(name, dtype=torch.float64)
    features, maps = model.forward_intermediates(x)
    assert_near(features, model.forward_features(x), 1e-10)
    for indices in [range(len(maps)), (0,), (len(maps) - 1,), (0, 2)]:
        extractor = make(
            name, features_only=True, out_indices=tuple(indices), pretrained=True,
            pretrained_cfg_overlay=dict(file=str(path))).double()
        channels_last = str(getattr(extractor, 'output_fmt', 'NCHW')) in ('NHWC', 'Format.NHWC')
        extracted = extractor(x)
        taken = model.forward_intermediates(
            x, indices=list(indices), stop_early=True, intermediates_only=True)
        assert len(extracted) == len(taken) == len(indices)
        for i, a, b in zip(indices, extracted, taken, strict=True):
            assert_near(a.permute(0, 3, 1, 2) if channels_last else a, maps[i], 1e-10, f'feature {i}')
            assert_near(b, maps[i], 1e-10, f'intermediate {i}')


@every_model
def test_pruning(name):
    model = randomise(make(name, num_classes=5)).double()
    x = images(name, dtype=torch.float64)
    expected = model.forward_intermediates(x, intermediates_only=True)
    counts = [num_parameters(model)]
    for last in (len(expected) - 1, 1, 0):
        pruned = copy.deepcopy(model)
        assert list(pruned.prune_intermediate_layers([last])) == [last]
        counts.append(num_parameters(pruned))
        kept = pruned.forward_intermediates(x, indices=[last], intermediates_only=True)
        assert len(kept) == 1
        assert_near(kept[0], expected[last], 1e-10)
    assert all(a > b for a, b in zip(counts, counts[1:], strict=False)), counts


# classifier


@every_model
def test_reset_classifier(name):
    model = randomise(make(name, num_classes=5))
    x = images(name)
    features = model.forward_features(x)
    assert model.num_classes == 5 and model(x).shape == (2, 5)
    assert_near(model.forward_head(features), model(x), 1e-5)
    assert model.forward_head(features, pre_logits=True).shape == (2, model.head_hidden_size)
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(x).shape == (2, 7)
    classifier = model.get_classifier()
    linears = classifier if isinstance(classifier, (tuple, list, nn.ModuleList)) else [classifier]
    assert all(m.out_features == 7 for m in linears if m is not None)
    named = config(name)['classifier']
    assert model.get_submodule(named if isinstance(named, str) else named[0]) in linears
    assert_near(model.forward_features(x), features, 1e-5)
    model.reset_classifier(0)
    pooled = model(x)
    assert model.num_classes == 0 and pooled.shape == (2, model.num_features)
    assert_near(make_pool_free(model)(x), features, 1e-5)


def make_pool_free(model):
    model.reset_classifier(0, '')
    return model


@every_model
def test_no_classes(name):
    model = make(name, num_classes=0)
    assert model(images(name)).shape == (2, model.num_features)
    assert not any(p.dim() == 2 and 1000 in p.shape for p in model.parameters())


@every_model
def test_channels(name):
    model = make(name, in_chans=1, num_classes=5)
    assert model(images(name)[:, :1]).shape == (2, 5)
    stem = model.get_submodule(config(name)['first_conv'])
    assert stem.weight.shape[1] == 1


@every_model
def test_what_are_no_images(name):
    model = make(name, num_classes=5)
    x = images(name)
    H, W = x.shape[2:]
    for wrong, words in (
            (x[:, :1], rf'^x: got shape \[2, 1, {H}, {W}\], must be images \(B, 3, H, W\)\. .*in_chans='),
            (x.permute(0, 2, 3, 1), r'must be images \(B, 3, H, W\)\. .*x\.permute\(0, 3, 1, 2\)'),
            (x[0].permute(1, 2, 0), r'must be images \(B, 3, H, W\)\. .*x\.permute\(2, 0, 1\)\[None\]'),
            (x[0], r'must be images \(B, 3, H, W\)\. x\[None\]'),
            (x.byte(), '^x: got whole numbers, must be images of a floating-point type'),
    ):
        with pytest.raises(ValueError, match=words):
            model(wrong)


# training


@every_model
def test_weight_decay_groups(name):
    model = make(name, num_classes=5)
    spared = set(model.no_weight_decay()) if hasattr(model, 'no_weight_decay') else set()
    names = {n for n, _ in model.named_parameters()}
    assert spared <= names
    groups = param_groups_weight_decay(model, .05, no_weight_decay_list=spared)
    grouped = [id(p) for g in groups for p in g['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    decayed = {id(p) for g in groups if g['weight_decay'] for p in g['params']}
    assert {n for n, p in model.named_parameters() if id(p) in decayed} == {
        n for n, p in model.named_parameters() if p.dim() > 1 and n not in spared}


@every_model
def test_layer_decay_groups(name):
    model = make(name, num_classes=5)
    groups = param_groups_layer_decay(model, weight_decay=.05, layer_decay=.5)
    grouped = [id(p) for g in groups for p in g['params']]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters())
    scale = {id(p): g['lr_scale'] for g in groups for p in g['params']}
    scale = {n: scale[id(p)] for n, p in model.named_parameters()}
    named = config(name)['classifier']
    for classifier in (named,) if isinstance(named, str) else named:
        assert scale[f'{classifier}.weight'] == scale[f'{classifier}.bias'] == 1
    stem = config(name)['first_conv']
    assert scale[f'{stem}.weight'] == min(scale.values()) < 1
    # parameters of a block share a layer, and deeper blocks are no slower
    fine = group_parameters(model, model.group_matcher(coarse=False))
    coarse = group_parameters(model, model.group_matcher(coarse=True))
    for by_layer in (fine, coarse):
        counts = Counter(n for group in by_layer.values() for n in group)
        assert counts == Counter(dict.fromkeys(scale, 1))
    assert 2 < len(coarse) <= len(fine)


@every_model
@pytest.mark.parametrize('autocast', [False, True])
def test_every_parameter_learns(name, autocast):
    rates = {'drop_path_rate': 0.} if 'drop_path_rate' in arguments_of(family_of(name).model_cls) else {}
    model = randomise(make(name, num_classes=5, **rates))  # a path that all images lose has no gradient
    with torch.autocast('cpu', dtype=torch.bfloat16, enabled=autocast):
        _, grads = train_step(model, images(name, 4))
    for parameter, grad in grads.items():
        assert grad is not None, f'{parameter} has no gradient'
        assert grad.isfinite().all() and grad.abs().sum() > 0, parameter


@every_model
def test_gradient_checkpointing(name):
    model = randomise(make(name, num_classes=5)).double()
    x = images(name, 3, dtype=torch.float64)
    saved = []

    def count(tensor):
        saved[-1] += tensor.numel()
        return tensor

    runs = []
    for enable in (False, True, False):
        twin = copy.deepcopy(model)
        twin.set_grad_checkpointing(not enable)
        twin.set_grad_checkpointing(enable)
        saved.append(0)
        with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
            runs.append(train_step(twin, x))
    (y, grads), *others = runs
    for other, other_grads in others:
        assert_near(other, y, 1e-10)
        for parameter, grad in grads.items():
            assert_near(other_grads[parameter], grad, 1e-10, parameter)
    assert saved[1] < .7 * saved[0] and saved[2] == saved[0], saved


@every_model
def test_images_do_not_depend_on_their_batch(name):
    model = randomise(make(name, num_classes=5)).double()
    x = images(name, 3, dtype=torch.float64)
    y = model(x)
    assert y.std() > 1e-3
    assert_near(torch.cat([model(i[None]) for i in x]), y, 1e-10)
    assert torch.equal(model(x), y)


@every_model
@pytest.mark.parametrize('rate', [None, 'drop_rate', 'proj_drop_rate', 'drop_path_rate'])
def test_training_is_random_where_a_rate_says_so(name, rate):
    taken = arguments_of(family_of(name).model_cls)
    rates = [n for n in ('drop_rate', 'proj_drop_rate', 'drop_path_rate') if n in taken]
    if rate is not None and rate not in rates:
        pytest.skip(f'the class has no {rate}')
    model = randomise(make(name, num_classes=5, **{n: .5 if n == rate else 0. for n in rates})).train()
    x = images(name, batch=4)
    torch.manual_seed(1)
    first = model(x)
    assert torch.equal(model(x), first) == (rate is None)
    model.eval()
    assert torch.equal(model(x), model(x))


# layers that others have put their hands on


class Adapted(nn.Module):
    """A layer with another beside it, which adds to what it gives, as adapters of low rank are built."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer, self.beside = layer, copy.deepcopy(layer)
        self.beside.bias = None
        self.beside.weight.data = .3 * layer.weight.std() * torch.randn_like(layer.weight)

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return self.base_layer(x) + self.beside(x)


def adapt(model, name, layer):
    model.set_submodule(name, Adapted(layer))
    return layer.weight + model.get_submodule(name).beside.weight, layer.bias


def hook(model, name, layer):
    layer.register_forward_hook(lambda layer, args, out: 1.2 * out)
    return 1.2 * layer.weight, None if layer.bias is None else 1.2 * layer.bias


def normalise_weight(model, name, layer):
    weight = 1.3 * layer.weight
    torch.nn.utils.weight_norm(layer)  # computes the weight when the layer is called
    layer.weight_g.data.mul_(1.3)
    return weight, layer.bias


def parametrise(model, name, layer):
    weight = 1.3 * layer.weight
    torch.nn.utils.parametrizations.weight_norm(layer)
    layer.parametrizations.weight.original0.data.mul_(1.3)
    return weight, layer.bias


@every_model
@pytest.mark.filterwarnings('ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning')
@pytest.mark.parametrize('change', [adapt, hook, normalise_weight, parametrise])
def test_changed_layers_are_used_as_they_are(name, change):
    changed = randomise(make(name, num_classes=5)).double()
    merged = copy.deepcopy(changed)
    layers = [(n, m) for n, m in changed.named_modules() if type(m) in (nn.Linear, nn.Conv2d)]
    for layer_name, layer in layers:
        with torch.no_grad():
            weight, bias = change(changed, layer_name, layer)
        merged.get_submodule(layer_name).weight.data = weight.detach()
        if bias is not None:
            merged.get_submodule(layer_name).bias.data = bias.detach()
    settle(merged, (side(name),) * 2)
    for norm, settled in zip(batch_norms(changed), batch_norms(merged), strict=True):
        norm.load_state_dict(settled.state_dict())
    x = images(name, dtype=torch.float64)
    expected = merged(x)
    assert_near(changed(x), expected, 1e-10)
    with torch.no_grad():
        assert_near(rewrite_for_runtimes(changed)(x), expected, 1e-10)
    assert_near(train_step(changed, x)[0], train_step(merged, x)[0], 1e-10)


@every_model
@pytest.mark.slow
def test_weights_of_integers(name):
    quantization = pytest.importorskip('torchao.quantization')
    model = randomise(make(name, num_classes=16))
    x = images(name)
    y = model(x)
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    with torch.no_grad():
        for quantised in (model, rewrite_for_runtimes(model)):
            assert (quantised(x) - y).square().mean().sqrt() < .1 * y.std()


# transforms


@every_model
def test_transforms(name):
    """Forward mode, gradients of several outputs at once, of each image by itself, and those that have a graph."""
    model = randomise(make(name, num_classes=3)).double()
    x, tangent = images(name, dtype=torch.float64).requires_grad_(), images(name, dtype=torch.float64)
    params = dict(model.named_parameters())
    with sdpa_kernel(SDPBackend.MATH):  # PyTorch's kernel for CPUs has neither forward mode nor second gradients
        y = model(x)
        upstream = torch.eye(y.numel(), dtype=torch.float64).view(-1, *y.shape)
        jacobian = torch.stack([torch.autograd.grad(y, x, g, retain_graph=True)[0] for g in upstream])
        _, forward = torch.func.jvp(model, (x.detach(),), (tangent,))
        assert_near(forward, (jacobian * tangent).flatten(1).sum(1).view_as(y), 1e-9)
        batched, = torch.autograd.grad(y, x, upstream, is_grads_batched=True, retain_graph=True)
        assert_near(batched, jacobian, 1e-9)
        graphed, = torch.autograd.grad(y, x, upstream[0], create_graph=True)
        assert graphed.requires_grad
        assert_near(graphed, jacobian[0], 1e-9)

        weights = torch.randn(y.shape, dtype=torch.float64)

        def loss(params, image, weight):
            return (torch.func.functional_call(model, params, image[None]) * weight).sum()

        each = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0, 0))(params, x, weights)
    for i in range(len(x)):
        expected = torch.autograd.grad((y[i] * weights[i]).sum(), list(params.values()), retain_graph=True)
        for parameter, grad in zip(params, expected, strict=True):
            assert (each[parameter][i] - grad).abs().max() < 1e-9 * grad.abs().max() + 1e-12, parameter


# devices, dtypes, copies


@every_model
def test_meta_device(name):
    model = create_model(name, device='meta', dtype=torch.bfloat16)
    for k, x in [*model.named_parameters(), *model.named_buffers()]:
        assert x.is_meta, k
    assert all(p.dtype == torch.bfloat16 for p in model.parameters())
    x = torch.zeros(1, *model.pretrained_cfg['input_size'], device='meta', dtype=torch.bfloat16)
    assert model(x).shape == (1, model.num_classes)


@every_model
def test_initialisation_after_the_meta_device(name):
    model = make(name, device='meta', num_classes=5)
    if not hasattr(model, 'init_weights'):
        pytest.skip('the class has no init_weights(), as some of timm have none')
    model = model.to_empty(device='cpu')
    with torch.no_grad():
        for x in (*model.parameters(), *model.buffers()):
            x.fill_(float('nan') if x.is_floating_point() else 7)
    model.init_weights()
    fresh = make(name, num_classes=5)
    for k, x in fresh.state_dict().items():
        assert_near_spread(model.state_dict()[k], x, k)
    assert model(images(name)).isfinite().all()


def assert_near_spread(x, expected, name):
    """Two draws from one distribution."""
    assert x.isfinite().all(), name
    if not expected.is_floating_point():
        assert torch.equal(x, expected), name
    elif expected.numel() > 1:
        spread, wanted = x.double().std(correction=0).item(), expected.double().std(correction=0).item()
        chance = max(.4, 4 / expected.numel() ** .5)  # few draws differ by more
        assert spread == pytest.approx(wanted, rel=chance, abs=1e-12), name


@every_model
def test_bfloat16(name):
    model = randomise(make(name, num_classes=16))
    x = images(name)
    y = model(x)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        cast = model(x)
    half = model.bfloat16()(x.bfloat16())
    assert half.dtype == torch.bfloat16
    assert y.std() > 1e-3
    for other in (half, cast):
        assert (other.float() - y).square().mean().sqrt() < .1 * y.std()


@every_model
def test_statistics_can_be_found_anew(name):
    rates = {'drop_path_rate': 0.} if 'drop_path_rate' in arguments_of(family_of(name).model_cls) else {}
    model = randomise(make(name, num_classes=5, **rates)).double()
    trained, norms = copy.deepcopy(model).train(), batch_norms(model)
    if not norms:
        pytest.skip('no statistics')
    x = images(name, 4, dtype=torch.float64)
    for norm in batch_norms(trained):
        norm.momentum = 1.
    trained(x)
    elsa_models.reestimate_batch_norm(model, [x])
    for norm, expected in zip(norms, batch_norms(trained), strict=True):
        assert_near(norm.running_mean, expected.running_mean, 1e-9)
        assert_near(norm.running_var, expected.running_var, 1e-9)


@every_model
def test_copies(name):
    model = randomise(make(name, num_classes=5))
    x = images(name)
    y = model(x)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(twin(x), y)
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
    assert torch.equal(model(x), y)


# checkpoints


@every_model
def test_checkpoint_round_trip(name, tmp_path):
    model = randomise(make(name, num_classes=5))
    x = images(name)
    y = model(x)
    save_for_hf(model, tmp_path / 'hub', safe_serialization=True)
    torch.save(dict(state_dict={f'module.{k}': v for k, v in model.state_dict().items()}, epoch=3), tmp_path / 'a.pth')
    overlay = dict(file=str(tmp_path / 'a.pth'), num_classes=5)
    for twin in (
            create_model(f'local-dir:{tmp_path / "hub"}', pretrained=True).eval(),
            make(name, num_classes=5, pretrained=True, pretrained_cfg_overlay=overlay),
    ):
        assert twin.state_dict().keys() == model.state_dict().keys()
        for k, v in model.state_dict().items():
            assert torch.equal(twin.state_dict()[k], v), k
        assert torch.equal(twin(x), y)
    with pytest.raises(RuntimeError, match='Missing|Unknown'):
        state_dict = model.state_dict()
        state_dict['strange'] = state_dict.pop(next(iter(state_dict)))
        torch.save(state_dict, tmp_path / 'b.pth')
        make(name, num_classes=5, pretrained=True, pretrained_cfg_overlay=dict(overlay, file=str(tmp_path / 'b.pth')))


@every_model
def test_checkpoint_for_other_classes_and_channels(name, tmp_path):
    model = randomise(make(name, num_classes=5)).double()
    torch.save(model.state_dict(), tmp_path / 'a.pth')
    load = dict(pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / 'a.pth'), num_classes=5))
    x = images(name, dtype=torch.float64)
    for num_classes in (3, 0):
        twin = make(name, num_classes=num_classes, **load).double()
        assert_near(twin.forward_features(x), model.forward_features(x), 1e-5)
        assert twin(x).shape[1] == (num_classes or twin.num_features)
    grey = make(name, num_classes=5, in_chans=1, **load).double()
    assert_near(grey(x[:, :1]), model(x[:, :1].expand(x.shape)), 1e-4)


# graphs


@every_model
def test_torchscript(name):
    model = randomise(make_flexible(name, num_classes=5)).double()
    scripted = torch.jit.script(model)
    for size in sizes(name):
        x = images(name, size=size, dtype=torch.float64)
        assert_near(scripted(x), model(x), 1e-10)


@every_model
def test_fx(name):
    model = randomise(make(name, num_classes=5)).double()
    _, nodes = get_graph_node_names(model)
    graph = GraphExtractNet(model, [nodes[-1]]).eval()
    for batch in (1, 3):
        x = images(name, batch, dtype=torch.float64)
        assert_near(graph(x), model(x), 1e-10)


@every_model
def test_torch_export(name):
    model = randomise(make(name, num_classes=5)).double()
    batch = torch.export.Dim('batch', min=1, max=64)
    program = torch.export.export(model, (images(name, dtype=torch.float64),), dynamic_shapes=({0: batch},))
    exported = program.module()
    for batch in (1, 2, 5):
        x = images(name, batch, dtype=torch.float64)
        assert_near(exported(x), model(x), 1e-10)


@every_model
@pytest.mark.slow
@pytest.mark.parametrize('how', ['autocast', 'float64 by default'])
def test_torch_export_of_open_sizes(name, how):
    default = torch.get_default_dtype()
    try:
        if how != 'autocast':
            torch.set_default_dtype(torch.float64)
        model = randomise(make_flexible(name, num_classes=5))
        x = torch.randn(2, 3, *([side(name) + 32] * 2))  # positions are resampled
        shapes = ({i: torch.export.Dim.DYNAMIC for i in (0, 2, 3)},)
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
            program = torch.export.export(model, (x,), dynamic_shapes=shapes)
            y, expected = program.module()(x).double(), model(x).double()
    finally:
        torch.set_default_dtype(default)
    assert max_error(y, expected) <= (.05 if how == 'autocast' else 1e-6) * expected.abs().max()


@every_model
def test_onnx(name, tmp_path):
    onnx, onnxruntime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    model = randomise(make(name, num_classes=5))
    path = elsa_models.export_onnx(model, tmp_path / 'model.onnx')
    graph = onnx.load(str(path), load_external_data=False).graph
    assert {n.domain for n in graph.node} == {''}
    assert not {n.op_type for n in graph.node} & REFUSED_OPERATORS
    session = onnxruntime.InferenceSession(str(path), providers=['CPUExecutionProvider'])
    for batch in (1, 3):
        x = images(name, batch)
        y, = session.run(None, {'image': x.numpy()})
        assert_near(torch.from_numpy(y), model(x), 1e-3)


@every_model
@pytest.mark.slow
def test_compiled_whole(name, fresh_compiler):
    model = randomise(make(name, num_classes=5)).double()
    compiled = torch.compile(model, fullgraph=True, backend='aot_eager')
    x = images(name, dtype=torch.float64)
    assert_near(compiled(x), model(x), 1e-9)
    y, grads = train_step(model, x)
    z, others = train_step(torch.compile(model, fullgraph=True, backend='aot_eager'), x)
    assert_near(z, y, 1e-9)
    for parameter, grad in grads.items():
        assert_near(others[f'_orig_mod.{parameter}'], grad, 1e-8, parameter)


@pytest.mark.parametrize('name', [n for n in NAMES if is_small(n)])
def test_learns_a_batch(name):
    model = make(name, num_classes=4).train()
    x, target = images(name, 8), torch.arange(8) % 4
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x), target)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < .6 * losses[0], losses
    assert max_error(model.eval()(x), model(x)) == 0


@pytest.mark.slow
@pytest.mark.parametrize('name', [n for n in NAMES if is_small(n)])
def test_learns_the_digits(name):
    model = create_model(name, num_classes=10, **(dict(img_size=32) if takes_one_size(name) else {}))
    assert learn_digits(model, lambda x, y: F.cross_entropy(model(x), y)) >= .97


@pytest.mark.slow
@pytest.mark.parametrize('name', [
    n for n in NAMES if is_small(n) and issubclass(family_of(n).model_cls, TokenLabelModel)])
def test_learns_the_digits_from_token_labels(name):
    model = create_model(name, num_classes=10, img_size=32, use_mix_token=True)

    def loss(x, y):
        out = model.forward_train(x)
        return token_label_loss(out, y, y[:, None, None].expand(-1, *out.token_logits.shape[1:3]))

    assert learn_digits(model, loss) >= .97
