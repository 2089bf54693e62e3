"""What `warm_up` makes ready, and what it leaves as it was."""
import copy

import pytest
import torch
from timm import create_model

import elsa_models
from elsa_models.ops import _numba

pytestmark = pytest.mark.skipif(_numba.why_not() is not None, reason='Numba does not serve here')


@pytest.fixture(autouse=True)
def operators():
    """Those of use, unlike in the other tests of models."""


@pytest.fixture
def compiled(monkeypatch):
    """The kernels of this process, of which there are none at first."""
    kernels = {}
    monkeypatch.setattr(_numba, '_compiled', kernels)
    return kernels


def infer(model, images):
    with torch.no_grad():
        model.eval()(images)


@pytest.mark.parametrize('train', [False, True])
def test_kernels_are_there_afterwards(compiled, train):
    models = create_model('test_elsa_swin'), create_model('test_sasa_resnet')
    elsa_models.warm_up(*models, train=train)
    ready = dict(compiled)
    assert ready
    images = torch.randn(2, 3, 64, 64)
    for model in models:
        infer(model, images)
        if train:
            model(images).sum().backward()
    assert compiled == ready
    if not train:
        models[0](images).sum().backward()
        assert compiled != ready


def test_models_stay_as_they_are(compiled):
    model = create_model('test_sasa_resnet').train()
    model.stem.eval()
    model.head.fc.weight.requires_grad_(False)
    state, modes = copy.deepcopy(model.state_dict()), [m.training for m in model.modules()]
    random = torch.get_rng_state()
    elsa_models.warm_up(model, train=True)
    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize('kwargs', [dict(img_size=(40, 72)), dict(in_chans=1), dict(num_classes=0)], ids=str)
def test_the_size_and_channels_are_the_models(kwargs):
    elsa_models.warm_up(create_model('test_elsa_swin', **kwargs).bfloat16(), train=True)
