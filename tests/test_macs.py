"""The counter behind the model table, and the table."""
import pytest
import torch
import torch.nn as nn
from timm import create_model
from timm.layers import set_fused_attn

from elsa_models import ElsaAttention, set_backend
from elsa_models.commands import models
from elsa_models.inspect import count_macs, count_macs_by_op

GMACS = {
    'elsa_swin_tiny': 4.771, 'elsa_swin_small': 9.558, 'elsa_swin_base': 16.666,
    'elsa_volo_d1_224': 7.16, 'elsa_volo_d1_384': 23.38,
    'elsa_volo_d2_224': 14.90, 'elsa_volo_d2_384': 47.82,
    'elsa_volo_d3_224': 21.53, 'elsa_volo_d3_448': 99.31,
    'elsa_volo_d4_224': 45.79, 'elsa_volo_d4_448': 202.94,
    'elsa_volo_d5_224': 74.59, 'elsa_volo_d5_448': 323.79, 'elsa_volo_d5_512': 436.50,
    'volo_d1_224': 6.92, 'volo_d1_384': 22.68,
}


@pytest.mark.parametrize('name', GMACS)
def test_counts_are_those_of_the_table(name):
    model = create_model(name, device='meta')
    gmacs = count_macs(model) / 1e9
    assert gmacs == pytest.approx(GMACS[name], rel=.001)
    if 'swin' in name:
        assert f'{gmacs:.3f}' == str(GMACS[name])


def test_attention_by_hand():
    H, W, C, G, K, qk = 6, 5, 24, 3, 5, 16

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, C, 2, stride=2)
            self.attn = ElsaAttention(C, G, kernel_size=K, lam=1)

        def forward(self, x):
            return self.attn(self.stem(x).permute(0, 2, 3, 1))

    N = H * W
    expected = {
        'stem': N * C * 3 * 4,
        'qkv': N * C * (2 * qk + C),
        'conv': N * qk * 8 * K * K,
        'logits': N * qk * G * K * K,
        'hadamard': N * qk,
        'op': 2 * K * K * C * N,
        'proj': N * C * C,
    }
    by_op = count_macs_by_op(Model(), (3, 2 * H, 2 * W))
    assert by_op['elsa_models.local_attention'] == expected['op'] and by_op['hadamard'] == expected['hadamard']
    assert sum(by_op.values()) == count_macs(Model(), (3, 2 * H, 2 * W)) == sum(expected.values())


def test_fused_attention_is_counted():
    counts = []
    for fused in (True, False):
        set_fused_attn(fused)
        try:
            model = create_model('test_elsa_volo', device='meta')
        finally:
            set_fused_attn(True)
        assert model.network[2][0].attn.fused_attn == fused
        counts.append(count_macs(model))
    assert counts[0] == counts[1]


def test_neither_backend_device_nor_mode_matter():
    model = create_model('test_elsa_volo')
    expected = count_macs(model)
    model.train()
    model.norm.eval()
    state = {k: x.clone() for k, x in model.state_dict().items()}
    set_backend('torch')
    try:
        assert count_macs(model) == expected
    finally:
        set_backend('auto')
    assert count_macs(create_model('test_elsa_volo', device='meta')) == expected
    # nothing about the model has changed
    assert model.training and model.head_drop.training and not model.norm.training
    assert all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    assert not any(p.is_meta for p in model.parameters())
    assert not any(m._forward_hooks for m in model.modules())


def test_what_only_training_does_is_not_counted():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(3, 8, 4, stride=4)
            self.norm = nn.BatchNorm1d(8)  # in training it refuses a batch of one
            self.fc, self.aux = nn.Linear(8, 5), nn.Linear(8, 7)

        def forward(self, x):
            x = self.norm(self.stem(x).mean((2, 3)))
            return (self.fc(x), self.aux(x)) if self.training else self.fc(x)

    model = Model().train()
    assert count_macs(model, (3, 8, 8)) == 2 * 2 * 8 * 3 * 16 + 8 * 5
    assert all(m.training for m in model.modules())


def test_size_follows_the_model():
    model = create_model('test_elsa_volo', device='meta')
    model.set_input_size(img_size=(96, 64))
    assert count_macs(model) == count_macs(create_model('test_elsa_volo', img_size=(96, 64), device='meta'))
    dynamic = create_model('test_elsa_volo', dynamic_img_size=True, device='meta')
    assert count_macs(dynamic, (3, 96, 64)) == count_macs(model)


def test_bad_size_is_refused():
    with pytest.raises(ValueError, match='input_size: got'):
        count_macs(create_model('test_elsa_volo', device='meta'), (64, 64))


def test_model_table(capsys):
    models.main(['elsa_swin_tiny', 'elsa_volo_d1_224', 'elsa_volo_d5_*'])
    header, rule, *rows = capsys.readouterr().out.strip().splitlines()
    cells = [[c.strip() for c in row.strip('|').split('|')] for row in (header, *rows)]
    assert cells[0] == [
        'model', 'input', 'params (M), computed', 'GMACs, computed', 'top-1 (%), the paper\'s', 'weights']
    assert set(rule) <= set('|-: ') and rule.count('|') == header.count('|')
    assert cells[1][:5] == ['elsa_swin_tiny', '224 x 224', '29.141', '4.77', '82.7']
    assert cells[2][:5] == ['elsa_volo_d1_224', '224 x 224', '26.672', '7.16', '84.7']
    assert cells[2][5] == 'none released'
    assert [r[0] for r in cells[3:]] == ['elsa_volo_d5_224', 'elsa_volo_d5_448', 'elsa_volo_d5_512']
    assert [r[4] for r in cells[3:]] == ['-', '-', '87.2']


def test_model_table_of_unknown_models(capsys):
    with pytest.raises(SystemExit):
        models.main(['elsa_nothing'])
    assert "no model is named 'elsa_nothing'" in capsys.readouterr().err
