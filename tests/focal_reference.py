"""The authors' Focal Transformer in a few lines of float64, from its description: by rolls and unfold, every key.

State dicts have the authors' names. `mistake` makes one of those errors that are easily made and hardly seen.
"""
import math
from typing import Dict, Optional, Sequence, Tuple

import torch
import torch.nn.functional as F

MISTAKES = (
    'zeros beyond the edge', 'edges masked', 'mean as pooling', 'pooled windows beyond the edge', 'repeats dropped',
    'pooled offset reversed', 'second and third copy swapped', 'window offset reversed', 'tanh GELU', 'epsilon 1e-6')


def to_windows(x: torch.Tensor, w: int) -> torch.Tensor:
    B, H, W, C = x.shape
    return x.view(B, H // w, w, W // w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, -1, w * w, C)


def attention(
        x: torch.Tensor,
        p: Dict[str, torch.Tensor],
        heads: int,
        w: int,
        e: int,
        f: int,
        wrap: bool = True,
        mistake: Optional[str] = None,
) -> torch.Tensor:
    """Focal attention of maps (B, H, W, C) with the parameters of one block: `attn.*` and `pool_layers.0.*`."""
    B, H, W, C = x.shape
    x = F.pad(x, (0, 0, 0, -W % w, 0, -H % w))
    rows, columns = x.shape[1] // w, x.shape[2] // w
    q, k, v = (x @ p['attn.qkv.weight'].t() + p['attn.qkv.bias']).split(C, dim=-1)
    keys, values, unseen = [to_windows(k, w)], [to_windows(v, w)], [torch.zeros(rows * columns, w * w).bool()]
    if e > 0:
        table = p['attn.relative_position_bias_table_to_neighbors'][0]
        seen = set()
        moves = [(e, e), (e, -e), (-e, e), (-e, -e)]
        if mistake == 'second and third copy swapped':
            moves[1], moves[2] = moves[2], moves[1]
        for down, right in moves:
            kept = [
                i for i in range(w * w) if not (0 <= i // w + down < w and 0 <= i % w + right < w)]
            places = [(i // w + down, i % w + right) for i in kept]
            inside = torch.zeros(1, rows * w + 2 * e, columns * w + 2 * e, 1)
            inside[:, e:-e, e:-e] = 1
            inside = inside[:, e + down:, e + right:][:, :rows * w, :columns * w]
            beyond = to_windows(inside, w)[0, :, kept, 0] == 0
            for part, maps in ((keys, k), (values, v)):
                moved = to_windows(maps.roll((-down, -right), (1, 2)), w)[:, :, kept]
                if mistake == 'zeros beyond the edge':
                    moved = moved.masked_fill(beyond[None, :, :, None], 0)
                part.append(moved)
            hidden = beyond if not wrap or mistake == 'edges masked' else torch.zeros_like(beyond)
            if mistake == 'repeats dropped':
                hidden = hidden | torch.tensor([place in seen for place in places])
            seen.update(places)
            unseen.append(hidden)
    weight = p['pool_layers.0.weight'][0]
    if mistake == 'mean as pooling':
        weight = torch.full_like(weight, 1 / w ** 2)
    pooled = torch.einsum('bnpc,p->bnc', to_windows(x, w), weight) + p['pool_layers.0.bias']
    _, pooled_k, pooled_v = (pooled @ p['attn.qkv.weight'].t() + p['attn.qkv.bias']).split(C, dim=-1)
    for part, tokens in ((keys, pooled_k), (values, pooled_v)):
        tokens = F.unfold(tokens.view(B, rows, columns, C).permute(0, 3, 1, 2), f, padding=f // 2)
        part.append(tokens.view(B, C, f * f, -1).permute(0, 3, 2, 1))
    outside = F.unfold(torch.ones(1, 1, rows, columns), f, padding=f // 2)[0].t() == 0
    unseen.append(outside & (mistake != 'pooled windows beyond the edge'))

    i, j = torch.arange(w * w), torch.arange(f * f)
    own = (i[:, None] // w - i // w, i[:, None] % w - i % w)
    if mistake == 'window offset reversed':
        own = (-own[0], -own[1])
    around = (i[:, None] // w - j // f, i[:, None] % w - j % f)
    if mistake == 'pooled offset reversed':
        around = (w - f - around[0], w - f - around[1])
    bias = [
        p['attn.relative_position_bias_table'][(own[0] + w - 1) * (2 * w - 1) + own[1] + w - 1].permute(2, 0, 1),
        p['attn.relative_position_bias_table_to_windows.0'][
            :, (around[0] + f - 1) * (w + f - 1) + around[1] + f - 1]]
    if e > 0:
        bias.insert(1, table)

    def split(x):
        return x.unflatten(3, (heads, C // heads)).transpose(2, 3)

    logits = split(to_windows(q, w)) * (C // heads) ** -.5 @ split(torch.cat(keys, dim=2)).transpose(-2, -1)
    logits = logits + torch.cat(bias, dim=2) - 100. * torch.cat(unseen, dim=1)[:, None, None]
    x = (logits.softmax(dim=-1) @ split(torch.cat(values, dim=2))).transpose(2, 3).flatten(3)
    x = x.view(B, rows, columns, w, w, C).permute(0, 1, 3, 2, 4, 5).reshape(B, rows * w, columns * w, C)
    return (x @ p['attn.proj.weight'].t() + p['attn.proj.bias'])[:, :H, :W]


def network(
        state_dict: Dict[str, torch.Tensor],
        images: torch.Tensor,
        depths: Sequence[int],
        heads: Sequence[int],
        window: int = 7,
        expand_sizes: Sequence[int] = (3, 3, 3, 3),
        focal_windows: Sequence[int] = (7, 5, 3, 1),
        shrink: bool = True,
        wrap: bool = True,
        mistake: Optional[str] = None,
) -> Tuple[torch.Tensor, list]:
    """Logits of images (B, 3, H, W), and the map of each stage."""
    def norm(x, name):
        return F.layer_norm(
            x, x.shape[-1:], state_dict[f'{name}.weight'], state_dict[f'{name}.bias'],
            1e-6 if mistake == 'epsilon 1e-6' else 1e-5)

    def convolve(x, name):
        weight = state_dict[f'{name}.proj.weight']
        stride, padding = {7: (4, 2), 4: (4, 0), 3: (2, 1), 2: (2, 0)}[weight.shape[2]]
        x = F.conv2d(x.permute(0, 3, 1, 2), weight, state_dict[f'{name}.proj.bias'], stride, padding)
        return norm(x.permute(0, 2, 3, 1), f'{name}.norm')

    def linear(x, name):
        return x @ state_dict[f'{name}.weight'].t() + state_dict[f'{name}.bias']

    x, maps = convolve(images.permute(0, 2, 3, 1), 'patch_embed'), []
    for s, depth in enumerate(depths):
        w, e = window, expand_sizes[s]
        if shrink and min(x.shape[1:3]) <= w:
            w, e = min(x.shape[1:3]), 0
        for b in range(depth):
            prefix = f'layers.{s}.blocks.{b}.'
            p = {k[len(prefix):]: v for k, v in state_dict.items() if k.startswith(prefix)}
            x = x + attention(norm(x, prefix + 'norm1'), p, heads[s], w, e, focal_windows[s], wrap, mistake)
            hidden = linear(norm(x, prefix + 'norm2'), prefix + 'mlp.fc1')
            hidden = F.gelu(hidden, approximate='tanh' if mistake == 'tanh GELU' else 'none')
            x = x + linear(hidden, prefix + 'mlp.fc2')
        maps.append(x)
        if s + 1 < len(depths):
            x = convolve(x, f'layers.{s}.downsample')
    return linear(norm(x, 'norm').mean(dim=(1, 2)), 'head'), maps


_RENAMES = (
    ('.attn.pool.', '.pool_layers.0.'),
    ('.surround_bias', '.relative_position_bias_table_to_neighbors'),
    ('.pooled_bias', '.relative_position_bias_table_to_windows.0'),
    ('head.fc.', 'head.'),
)


def to_authors(state_dict: Dict[str, torch.Tensor]) -> Dict[str, torch.Tensor]:
    """A state dict of ours as the authors would write it, with the buffers that theirs save."""
    out = {}
    for key, x in state_dict.items():
        for ours, theirs in _RENAMES:
            key = key.replace(ours, theirs)
        if '.downsample.' in key:
            _, stage, *rest = key.split('.')
            key = '.'.join(['layers', str(int(stage) - 1), *rest])
        out[key] = x
        if key.endswith('.relative_position_bias_table'):
            area = ((math.isqrt(x.shape[0]) + 1) // 2) ** 2
            out[key[:-len('bias_table')] + 'index'] = torch.zeros(area, area, dtype=torch.long)
    return out
