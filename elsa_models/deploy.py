"""Models rewritten for inference runtimes: the same outputs from operators that these run fast."""
import copy
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from .layers import ElsaAttention


class RotatedDepthwiseConv2d(nn.Module):
    """A grouped convolution of w channels per group as a sum of w depthwise ones, each of rotated channels.

    Runtimes have fast kernels for depthwise and for dense convolutions. Groups of 4 or 8 channels fall in between: in
    ONNX Runtime they take 1.2 to 2.7 times as long as this sum. Channels are ordered by their position in the group,
    position-major, so that a rotation by C / w brings each channel to the next of its group.
    """

    def __init__(self, conv: nn.Conv2d) -> None:
        """
        Args:
            conv: The grouped convolution, as many channels out as in, its channels group-major.
        """
        super().__init__()
        C, width, K_h, K_w = conv.weight.shape
        self.padding, self.dilation, self.width = conv.padding, conv.dilation, width
        weight = conv.weight.detach().unflatten(0, (C // width, width))  # group, out position, in position, K, K
        out = torch.arange(width, device=weight.device)
        rotations = [weight[:, out, (out + i) % width].transpose(0, 1).reshape(C, 1, K_h, K_w) for i in range(width)]
        self.weights = nn.ParameterList([_constant(x) for x in rotations])
        self.bias = conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map (B, C, H, W) to the same, both position-major."""
        C = x.shape[1]
        twice = torch.cat([x, x], dim=1)  # one slice per rotation, where torch.roll is exported as three operators
        y = self._conv(x, 0)
        for i in range(1, self.width):
            y = y + self._conv(twice.narrow(1, i * (C // self.width), C), i)
        return y

    def _conv(self, x: torch.Tensor, i: int) -> torch.Tensor:
        bias = self.bias if i == 0 else None
        return F.conv2d(x, self.weights[i], bias, padding=self.padding, dilation=self.dilation, groups=x.shape[1])


def _constant(x: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(x, requires_grad=False)


def rewrite_for_runtimes(model: nn.Module) -> nn.Module:
    """A copy of a model, in eval mode, whose attention's convolutions are sums of depthwise ones.

    Outputs are those of the model up to the order of sums. The copy is for export: its parameters have other names,
    and those that are not reordered are the model's own.
    """
    shared = {id(x): x for x in itertools.chain(model.parameters(), model.buffers())}
    model = copy.deepcopy(model, shared).eval()
    for module in model.modules():
        if isinstance(module, ElsaAttention) and isinstance(module.attn_conv, nn.Conv2d):
            _rewrite(module)
    return model


def _rewrite(attn: ElsaAttention) -> None:
    width = attn.attn_conv.weight.shape[1]
    qk_dim = attn.split_dims[0]
    if width == 1 or width > 8:  # what runtimes have kernels for
        return
    order = torch.arange(qk_dim, device=attn.qkv.weight.device).reshape(-1, width).t().reshape(-1)  # position-major
    q, k, v = attn.qkv.weight.split(attn.split_dims)
    attn.qkv.weight = _constant(torch.cat([q[order], k[order], v]))
    if attn.qkv.bias is not None:
        q, k, v = attn.qkv.bias.split(attn.split_dims)
        attn.qkv.bias = _constant(torch.cat([q[order], k[order], v]))
    attn.attn_logits.weight = _constant(attn.attn_logits.weight[:, order])
    attn.attn_conv = RotatedDepthwiseConv2d(attn.attn_conv)
    if attn.attn_conv.bias is not None:
        attn.attn_conv.bias = _constant(attn.attn_conv.bias[order])
