"""How mixers are drawn, as they say and under timm's initialisers; and that each does with its options what it says."""
import inspect

import pytest
import torch
import torch.nn as nn
from timm.models import named_apply
from timm.models.vision_transformer import get_init_weights_vit

from elsa_models.layers import (
    ElsaAttention,
    FocalAttention,
    KeyOnlyAttention,
    LocalGlobalAttention,
    StandAloneSelfAttention,
    UnifiedNeighbourhoodAttention,
    UnifiedWindowAttention,
    WindowAttention,
)
from elsa_models.layers.mixers.axial import AxialLayer

MIXERS = {
    'elsa': lambda: ElsaAttention(64, 4),
    'focal': lambda: FocalAttention(64, 4),
    'key_only': lambda: KeyOnlyAttention(64, 4),
    'sasa': lambda: StandAloneSelfAttention(64, 4),
    'neighbourhood': lambda: UnifiedNeighbourhoodAttention(64, 4, 7, ('qk', 'qr', 'rk', 'r')),
    'identity': lambda: UnifiedNeighbourhoodAttention(64, 64, 7, 'r', 'identity'),
    'filter': lambda: UnifiedWindowAttention(64, 4, (14, 14), 7, terms='qr', normalisation='filter'),
}


def spread(x):
    return x.double().std(correction=0).item()


@pytest.mark.parametrize('name', MIXERS)
def test_timms_initialisers_leave_a_mixer_as_it_is_drawn(name):
    fresh, module = MIXERS[name](), nn.Sequential(MIXERS[name]())
    named_apply(get_init_weights_vit(''), module)
    for k, x in fresh.named_parameters():
        assert spread(module[0].get_parameter(k)) == pytest.approx(spread(x), rel=max(.2, 4 / x.numel() ** .5)), k


@pytest.mark.parametrize('mixer,expected', [
    (KeyOnlyAttention(64, 4), {'saliency.weight': 1 / 8, 'v.weight': 1 / 8, 'proj.weight': 1 / 8}),
    (AxialLayer(64, 4, 56, in_dim=16), {
        'qkv.weight': 1 / 4, 'rel_query': 1 / 4, 'rel_key': 1 / 4, 'rel_value': 1 / 4}),
    (MIXERS['identity'](), {'v.weight': .02, 'relative_position_bias_table': 1 / 7}),
    (MIXERS['neighbourhood'](), {'q.weight': .02, 'relative_key_table': .02, 'relative_query_table': .02}),
], ids=['key_only', 'axial', 'identity', 'neighbourhood'])
def test_spread_of_parameters(mixer, expected):
    for name, value in expected.items():
        assert spread(mixer.get_parameter(name)) == pytest.approx(value, rel=.1), name


def test_a_filter_starts_with_the_root_of_one_part():
    gain = MIXERS['filter']().gain
    assert gain.tolist() == pytest.approx([1 / 7] * 4)


SMALL = {
    ElsaAttention: (8, 2),
    FocalAttention: (8, 2, 3, 1, 3),
    LocalGlobalAttention: (8, 2, (6, 6), (1, 2), 3),
    StandAloneSelfAttention: (8, 2, 3),
    UnifiedNeighbourhoodAttention: (8, 2, 3),
    UnifiedWindowAttention: (8, 2, (6, 6), 3),
    WindowAttention: (8, 2, (6, 6), 3),
}


def with_option(name):
    takes = [cls for cls in SMALL if name in inspect.signature(cls).parameters]
    return pytest.mark.parametrize('cls', takes, ids=lambda cls: cls.__name__)


@with_option('proj_drop')
def test_dropout_of_the_output(cls):
    mixer = cls(*SMALL[cls], proj_drop=1.)
    x = torch.randn(1, 6, 6, 8)
    assert not mixer.train()(x).any() and mixer.eval()(x).all()


@with_option('attn_drop')
def test_dropout_of_the_weights(cls):
    mixer = cls(*SMALL[cls], attn_drop=.5)
    x = torch.randn(1, 6, 6, 8)
    assert not torch.equal(mixer.train()(x), mixer(x))
    assert torch.equal(mixer.eval()(x), mixer(x))


@with_option('qkv_bias')
def test_biases_can_be_left_out(cls):
    def biases(value):
        return {n for n, _ in cls(*SMALL[cls], qkv_bias=value).named_parameters() if n.endswith('.bias')}

    left_out = biases(True) - biases(False)
    assert left_out and biases(False) <= biases(True)
    assert not [n for n in biases(False) if n.split('.')[-2] in ('q', 'k', 'v', 'qkv')]
