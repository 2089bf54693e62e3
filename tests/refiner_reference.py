"""Refiner-ViT once more, plainly and in the authors' arrangement, and the numbers recorded of their code.

Weights have the authors' names. The definition is that of their released code, see data/PROVENANCE.md: x is halved
before norms, query and key are scaled each, statistics are sums over entries. Nothing of the package is used.
"""
import csv
import zlib

import numpy as np
import torch
import torch.nn.functional as F
from helpers import DATA

FOLDER = DATA / 'refiner'

# what one may get wrong, by name: the reference commits it where asked to
MISTAKES = (
    'no carry', 'carry without scale', 'refined map handed on', 'no scale after BN4', 'no identity in the refinement',
    'even blocks apply S', 'no factor 2 after the MLP', 'eps of norms on maps', 'convolution transposed',
    'replicate padding', 'ReLU for ReLU6', 'tanh GELU', 'eps of LayerNorm', 'x is not halved',
)


def recorded(name):
    """Arrays of a recorded file as tensors."""
    with np.load(FOLDER / f'{name}.npz') as file:
        return {key: torch.from_numpy(file[key]) for key in file.files}


def recorded_gradients(name):
    """By authors' name: inner product of a gradient with its probe, and norm."""
    with open(FOLDER / f'{name}_grads.tsv', newline='') as file:
        rows = list(csv.reader(file, delimiter='\t'))[1:]
    return {key: (float(dot), float(norm)) for key, dot, norm in rows}


def keyed(key, shape):
    """Numbers that depend on a name alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()))).double()


def keyed_weight(key, shape):
    r = keyed(key, shape)
    if key.endswith('running_var'):
        return (1e-4 if key.endswith('DLA.bn1.running_var') else 1.) * (1 + .2 * r.abs())
    if key.endswith('running_mean'):
        return (1e-3 if key.endswith('DLA.bn1.running_mean') else .1) * r
    if key.endswith('.bias'):
        return .1 * r
    if key in ('pos_embed', 'cls_token'):
        return .5 * r
    if key.endswith('scale_channel'):
        return .5 + .1 * r
    return 1 + .1 * r if len(shape) == 1 else r / r[0].numel() ** .5


def keyed_state_dict(listing):
    """Weights in the authors' names for a list of these, data/refiner/keys_*.tsv."""
    with open(FOLDER / f'keys_{listing}.tsv', newline='') as file:
        rows = list(csv.reader(file, delimiter='\t'))[1:]
    out = {}
    for key, shape, dtype in rows:
        shape = () if shape == 'scalar' else tuple(int(n) for n in shape.split('x'))
        out[key] = torch.zeros(shape, dtype=torch.int64) if dtype == 'int64' else keyed_weight(key, shape)
    return out


def to_authors(name):
    """Authors' name of an entry of ours."""
    for ours, theirs in {
            '.refine.expand.': '.DLA.conv_exp.', '.refine.bn1.': '.DLA.bn1.', '.refine.conv.': '.DLA.depth_sep_conv.',
            '.refine.bn2.': '.DLA.bn2.', '.refine.reduce.': '.DLA.conv_pro.', '.refine.bn3.': '.DLA.bn3.',
            '.refine.bn4.': '.adapt_bn.', '.attn.v.': '.attn.qkv.', '.ls2.gamma': '.mlp.scale_channel'}.items():
        name = name.replace(ours, theirs)
    return name


def randomise(model):
    """Give a model keyed weights, and return them in the authors' names."""
    state = {k: x if x.dtype == torch.int64 else keyed_weight(to_authors(k), tuple(x.shape))
             for k, x in model.state_dict().items()}
    model.load_state_dict(state)
    return {to_authors(k): x.clone() for k, x in state.items()}


class Reference:
    """The function of a state dict in the authors' names, in float64."""

    def __init__(self, state, num_heads, training=False, mistake=None):
        assert mistake is None or mistake in MISTAKES
        self.state, self.h, self.training, self.mistake = state, num_heads, training, mistake
        self.after = {}  # running statistics after a pass in training

    def __getitem__(self, key):
        return self.state[key]

    def norm(self, key, x, eps=1e-6):
        if self.mistake == 'eps of LayerNorm':
            eps *= 10
        mean = x.mean(-1, keepdim=True)
        var = ((x - mean) ** 2).mean(-1, keepdim=True)
        return (x - mean) / (var + eps).sqrt() * self[f'{key}.weight'] + self[f'{key}.bias']

    def batch_norm(self, key, x):
        eps = 1e-3 if self.mistake == 'eps of norms on maps' and 'blocks' in key else 1e-5
        mean, var = self[f'{key}.running_mean'], self[f'{key}.running_var']
        if self.training:
            n = x.numel() / x.shape[1]
            old_mean, old_var = mean, var
            mean = x.sum((0, 2, 3)) / n
            var = ((x - mean[:, None, None]) ** 2).sum((0, 2, 3)) / n
            self.after[f'{key}.running_mean'] = (.9 * old_mean + .1 * mean).detach()
            self.after[f'{key}.running_var'] = (.9 * old_var + .1 * var * n / (n - 1)).detach()
        scale = self[f'{key}.weight'] / (var + eps).sqrt()
        return (x - mean[:, None, None]) * scale[:, None, None] + self[f'{key}.bias'][:, None, None]

    def linear(self, key, x):
        return x @ self[f'{key}.weight'].t() + self[f'{key}.bias']

    def refine(self, key, maps, d):
        def act(x):
            return x.clamp(min=0) if self.mistake == 'ReLU for ReLU6' else x.clamp(0, 6)

        y = torch.einsum('mh,bhij->bmij', self[f'{key}DLA.conv_exp.weight'][:, :, 0, 0], maps)
        y = act(self.batch_norm(f'{key}DLA.bn1', y))
        weight = self[f'{key}DLA.depth_sep_conv.weight'][:, 0]
        if self.mistake == 'convolution transposed':
            weight = weight.transpose(1, 2)
        N = y.shape[2]
        y = F.pad(y, (1, 1, 1, 1), mode='replicate' if self.mistake == 'replicate padding' else 'constant')
        y = sum(weight[:, i, j, None, None] * y[:, :, i:i + N, j:j + N] for i in range(3) for j in range(3))
        y = act(self.batch_norm(f'{key}DLA.bn2', y))
        y = torch.einsum('hm,bmij->bhij', self[f'{key}DLA.conv_pro.weight'][:, :, 0, 0], y)
        y = self.batch_norm(f'{key}DLA.bn3', y)
        if self.mistake != 'no identity in the refinement':
            y = y + maps
        y = self.batch_norm(f'{key}adapt_bn', y)
        return y if self.mistake == 'no scale after BN4' else y * d ** -.5

    def attention(self, key, x, maps):
        B, N, C = x.shape
        d = C // self.h
        qkv = self.linear(f'{key}qkv', x).reshape(B, N, -1, self.h, d)
        if qkv.shape[2] == 3:
            q, k, v = (qkv[:, :, i] for i in range(3))
            scores = torch.einsum('bihd,bjhd->bhij', q * d ** -.25, k * d ** -.25)
            applied = own = scores.exp() / scores.exp().sum(-1, keepdim=True)
            if maps is not None and self.mistake != 'no carry':
                applied = own + maps * (1. if self.mistake == 'carry without scale' else d ** -.5)
            maps = applied
            if self.mistake == 'even blocks apply S':
                applied = own
        else:
            v = qkv[:, :, 0]
            applied = self.refine(key, maps, d)
            if self.mistake == 'refined map handed on':
                maps = applied
        out = torch.einsum('bhij,bjhd->bihd', applied, v).reshape(B, N, C)
        return self.linear(f'{key}proj', out), maps

    def block(self, key, x, maps):
        half = 1. if self.mistake == 'x is not halved' else .5
        out, maps = self.attention(f'{key}attn.', self.norm(f'{key}norm1', x * half), maps)
        x = x + 2 * out
        y = self.linear(f'{key}mlp.fc1', self.norm(f'{key}norm2', x * half))
        y = F.gelu(y, approximate='tanh' if self.mistake == 'tanh GELU' else 'none')
        y = self[f'{key}mlp.scale_channel'] * self.linear(f'{key}mlp.fc2', y)
        return x + (1 if self.mistake == 'no factor 2 after the MLP' else 2) * y, maps

    def patches(self, images):
        x = images
        for i, (stride, pad) in enumerate(((2, 3), (1, 1), (1, 1)), 1):
            x = F.conv2d(x, self[f'patch_embed.conv{i}.weight'], stride=stride, padding=pad)
            x = self.batch_norm(f'patch_embed.bn{i}', x).clamp(min=0)
        weight = self['patch_embed.proj.weight']
        return F.conv2d(x, weight, self['patch_embed.proj.bias'], stride=weight.shape[-1])

    def tokens(self, patches):
        x = patches.flatten(2).transpose(1, 2)
        x = torch.cat([self['cls_token'].expand(len(x), 1, -1), x], 1) + self['pos_embed']
        depth = 1 + max(int(key.split('.')[1]) for key in self.state if key.startswith('blocks.'))
        maps = None
        for i in range(depth):
            x, maps = self.block(f'blocks.{i}.', x, maps)
        return self.norm('norm', x)

    def heads(self, tokens):
        """Logits of the class token, and of every other."""
        return self.linear('head', tokens[:, 0]), self.linear('aux_head', tokens[:, 1:])

    def __call__(self, images):
        """Logits as in evaluation."""
        tokens = self.tokens(self.patches(images))
        if 'aux_head.weight' not in self.state:
            return self.linear('head', tokens[:, 0])
        out, aux = self.heads(tokens)
        return out + .5 * aux.max(1).values
