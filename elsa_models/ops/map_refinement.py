"""Refinement of attention maps, and their product with values, without an expanded map in memory.

    M = scale * BN4(A + BN3(W3 * relu6(BN2(D * relu6(BN1(W1 * A))))))        out = M @ value

A is (B, h, N, N); W1 expands its h maps, D is a depthwise 3 x 3 convolution over queries and keys, W3 reduces.
Source: `Refiner: Refining Self-attention for Vision Transformers` - https://arxiv.org/abs/2106.03714

Plainly, each operator reads and writes maps, of which some are several times as many as A's: 118 MB per image and
operator for 16 heads and 785 tokens. Here, strips of query rows go through all operators while they are in the cache,
with a row more on either side for the convolution. With scale and shift of a norm known, it is part of the product
before it; where it has the batch's statistics, one pass over the strips finds those of BN2, another those of BN3 and
BN4. BN1's follow from the covariance of A's maps, for W1 is linear, and BN4's from variances and covariance of its two
terms. Backward keeps A and the outputs of D and W3, which is five maps a head where there are three expanded ones (24
with autograd alone), and goes over the strips twice, since each norm's gradient needs sums over the whole batch.
Products with values are those of whole maps: a strip has too few rows for a fast one.
"""
from typing import Iterator, List, NamedTuple, Optional, Sequence, Tuple

import torch
import torch.distributed
import torch.nn.functional as F

from ._autocast import without_autocast

_STRIP_BYTES = 2 ** 21  # of an expanded strip on the CPU: the second level's cache, or what is near
_STRIP_BYTES_GPU = 2 ** 26


class Norm(NamedTuple):
    """A BatchNorm: `(x - mean) / sqrt(var + eps) * weight + bias`."""
    weight: torch.Tensor
    bias: torch.Tensor
    mean: Optional[torch.Tensor]  # None, and var too: of the batch
    var: Optional[torch.Tensor]
    eps: float
    group: Optional[torch.distributed.ProcessGroup] = None  # whose processes share the batch's statistics


class Weights(NamedTuple):
    """Convolutions of a refinement: expand (m, h, 1, 1), depthwise (m, 1, 3, 3), reduce (h, m, 1, 1)."""
    expand: torch.Tensor
    depthwise: torch.Tensor
    reduce: torch.Tensor


class Moments(NamedTuple):
    """Mean and variance of each map over the batch, as running statistics take them (variance of a sample)."""
    mean: torch.Tensor
    var: torch.Tensor


def refine_plain(attn: torch.Tensor, weights: Weights, norms: Sequence[Norm], scale: float) -> torch.Tensor:
    """The formula, operator by operator, differentiable any number of times.

    Args:
        attn: (B, h, N, N), rows are queries.
        weights: Convolutions.
        norms: BN1 to BN4.
        scale: Factor of the result.

    Returns:
        Refined maps (B, h, N, N).
    """
    def normalise(x: torch.Tensor, norm: Norm) -> torch.Tensor:
        return F.batch_norm(x, norm.mean, norm.var, norm.weight, norm.bias, norm.mean is None, 0., norm.eps)

    x = F.relu6(normalise(F.conv2d(attn, weights.expand), norms[0]))
    x = F.relu6(normalise(F.conv2d(x, weights.depthwise, padding=1, groups=x.shape[1]), norms[1]))
    x = normalise(F.conv2d(x, weights.reduce), norms[2])
    return scale * normalise(attn + x, norms[3])


def refined_product(
        attn: torch.Tensor,
        value: torch.Tensor,
        weights: Weights,
        norms: Sequence[Norm],
        scale: float,
) -> Tuple[torch.Tensor, List[Optional[Moments]]]:
    """Product of refined maps and values. All tensors have the dtype of attn, float32 or float64.

    Args:
        attn: (B, h, N, N), B at least 1, rows are queries.
        value: (B, h, N, d).
        weights: Convolutions.
        norms: BN1 to BN4.
        scale: Factor of the refined maps.

    Returns:
        The product (B, h, N, d), and for each norm that uses the batch's statistics those, otherwise None.
    """
    attn = attn.contiguous()
    tensors = [attn, value, *weights]
    for norm in norms:
        tensors += norm[:2]
    norms = [norm._replace(mean=_detached(norm.mean), var=_detached(norm.var)) for norm in norms]
    if torch.is_grad_enabled() and any(x.requires_grad for x in tensors):
        out, *found = _RefinedProduct.apply(scale, norms, *tensors)
    else:
        out, state, _ = _forward(attn, value, weights, norms, scale)
        found = [x for moments in state.moments if moments is not None for x in moments]
    found = iter(found)
    return out, [Moments(next(found), next(found)) if norm.mean is None else None for norm in norms]


def _detached(x: Optional[torch.Tensor]) -> Optional[torch.Tensor]:
    return None if x is None else x.detach()


class _Affine(NamedTuple):
    """A norm whose statistics are known."""
    mean: torch.Tensor
    rstd: torch.Tensor
    gain: torch.Tensor  # weight * rstd
    shift: torch.Tensor  # bias - gain * mean
    share: float  # 1 / number of entries of the batch's maps, 0 for fixed statistics: the weight of their gradients


class _State(NamedTuple):
    affine: List[_Affine]
    moments: List[Optional[Moments]]
    mean: Optional[torch.Tensor]  # of A's maps, h
    scatter: Optional[torch.Tensor]  # sum over pixels of (A - mean)(A - mean)^T, h, h
    terms: Optional['_Terms']


class _Terms(NamedTuple):
    """Sums over this process's part of the batch, of A and of R, the output of W3, for each map."""
    mean: torch.Tensor  # of A
    mean_reduced: torch.Tensor
    spread_reduced: torch.Tensor  # sum of (R - mean)^2
    joint: torch.Tensor  # sum of (A - mean)(R - mean)


class _Kept(NamedTuple):
    """What backward takes from the forward pass, where norms with the batch's statistics had it made as a whole."""
    expanded: Optional[torch.Tensor]  # D's output, (B, m, N, N)
    reduced: Optional[torch.Tensor]  # W3's, (B, h, N, N)
    attn_value: Optional[torch.Tensor]  # A @ value, (B, h, N, d)
    reduced_value: Optional[torch.Tensor]  # R @ value


class _Statistics:
    """Mean and variance of parts that come one after the other."""

    def __init__(self) -> None:
        self.parts: List[Tuple[int, torch.Tensor, torch.Tensor]] = []

    def add(self, x: torch.Tensor) -> None:
        """Count in maps (B, C, rows, N)."""
        mean = x.mean(dim=(0, 2, 3))
        spread = torch.linalg.vector_norm(x - mean[:, None, None], dim=(0, 2, 3)).square()  # var() is 100 times slower
        self.parts.append((x.numel() // x.shape[1], mean, spread))

    def total(self) -> Tuple[int, torch.Tensor, torch.Tensor]:
        """Number of entries of each map, their mean and sum of squared differences to it."""
        count = sum(n for n, _, _ in self.parts)
        shares = torch.tensor([n for n, _, _ in self.parts], dtype=torch.float64).to(self.parts[0][1])
        means = torch.stack([mean for _, mean, _ in self.parts])
        mean = shares @ means / count
        spread = torch.stack([spread for _, _, spread in self.parts]).sum(dim=0)
        return count, mean, spread + shares @ (means - mean).square()


def _all_sum(group: Optional[torch.distributed.ProcessGroup], *tensors: torch.Tensor) -> List[torch.Tensor]:
    """Sums over the processes of a group."""
    if group is None:
        return list(tensors)
    flat = torch.cat([x.flatten() for x in tensors])
    torch.distributed.all_reduce(flat, group=group)
    return [x.view_as(y) for x, y in zip(flat.split([y.numel() for y in tensors]), tensors)]


def _settle(
        norm: Norm,
        count: int,
        mean: Optional[torch.Tensor],
        spread: Optional[torch.Tensor],
) -> Tuple[_Affine, Optional[Moments]]:
    """Fix a norm, to the statistics of the batch unless it has its own."""
    var: torch.Tensor
    moments: Optional[Moments]
    if norm.mean is not None and norm.var is not None:
        mean, var, moments, share = norm.mean, norm.var, None, 0.
    else:
        assert mean is not None and spread is not None
        if norm.group is not None:
            local = mean
            total, number = _all_sum(norm.group, count * mean, mean.new_tensor([count]))
            mean = total / number
            spread, = _all_sum(norm.group, spread + count * (local - mean).square())
            count = int(number.item())
        var, share = spread / count, 1. / count
        moments = Moments(mean, spread / max(count - 1, 1))
    rstd = (var + norm.eps).rsqrt()
    gain = norm.weight * rstd
    return _Affine(mean, rstd, gain, norm.bias - gain * mean, share), moments


class _Strips:
    """Strips of A on their way through the refinement."""

    def __init__(self, attn: torch.Tensor, weights: Weights, halo: int = 1) -> None:
        self.attn, self.weights = attn, weights
        self.expand, self.reduce = weights.expand.flatten(1), weights.reduce.flatten(1)
        self.halo = halo
        self.kept: Optional[torch.Tensor] = None  # D's output, from `keep` on

    def __iter__(self) -> Iterator[Tuple[slice, int, int]]:
        """Images and query rows of each strip."""
        B, _, N, _ = self.attn.shape
        size = _STRIP_BYTES_GPU if self.attn.device.type != 'cpu' else _STRIP_BYTES
        row = self.expand.shape[0] * N * self.attn.element_size()
        images = max(1, size // (row * N))
        rows = min(N, max(4, size // row - 2 * self.halo))
        rows = -(-N // -(-N // rows))  # of equal height
        for b in range(0, B, images):
            for low in range(0, N, rows):
                yield slice(b, b + images), low, min(low + rows, N)

    def maps(self, images: slice, low: int, high: int) -> torch.Tensor:
        """A: (b, h, rows, N)."""
        return self.attn[images, :, low:high]

    def hidden(self, images: slice, low: int, high: int, first: _Affine) -> torch.Tensor:
        """relu6(BN1(W1 * A)): (b, m, rows, N)."""
        x = self.maps(images, low, high)
        gain = (first.gain[:, None] * self.expand).expand(len(x), -1, -1)
        y = torch.bmm(gain, x.flatten(2)).add_(first.shift[:, None]).clamp_(0., 6.)
        return y.unflatten(2, (high - low, -1))

    def convolved(self, hidden: torch.Tensor, cut_low: int, cut_high: int) -> torch.Tensor:
        """D * hidden without some rows at either end, those that miss a neighbour: (b, m, rows, N)."""
        if cut_low == cut_high == 1:
            return F.conv2d(hidden, self.weights.depthwise, padding=(0, 1), groups=hidden.shape[1])
        x = F.conv2d(hidden, self.weights.depthwise, padding=1, groups=hidden.shape[1])
        return x[:, :, cut_low:x.shape[2] - cut_high]

    def expanded(self, images: slice, low: int, high: int, first: _Affine) -> torch.Tensor:
        """D * relu6(BN1(W1 * A)): (b, m, rows, N)."""
        if self.kept is not None:
            return self.kept[images, :, low:high]
        above, below = min(1, low), min(1, self.attn.shape[2] - high)
        return self.convolved(self.hidden(images, low - above, high + below, first), above, below)

    def keep(self, first: _Affine) -> Iterator[Tuple[Tuple[slice, int, int], torch.Tensor]]:
        """Strips and what `expanded` gives for them, which it keeps."""
        if self.kept is not None:
            for strip in self:
                yield strip, self.expanded(*strip, first)
            return
        B, _, N, _ = self.attn.shape
        kept = self.attn.new_empty(B, self.expand.shape[0], N, N)
        for images, low, high in self:
            x = self.expanded(images, low, high, first)
            kept[images, :, low:high] = x
            yield (images, low, high), x
        self.kept = kept

    def activated(self, x: torch.Tensor, second: _Affine) -> torch.Tensor:
        """relu6(BN2(x)): (b, m, rows, N)."""
        return torch.addcmul(second.shift[:, None, None], x, second.gain[:, None, None]).clamp_(0., 6.)

    def reduced(self, x: torch.Tensor, gain: Optional[torch.Tensor] = None) -> torch.Tensor:
        """W3 * x, times a gain of each map: (b, h, rows, N)."""
        matrix = self.reduce if gain is None else gain[:, None] * self.reduce
        return torch.bmm(matrix.expand(len(x), -1, -1), x.flatten(2)).unflatten(2, x.shape[2:])


def _forward(
        attn: torch.Tensor,
        value: torch.Tensor,
        weights: Weights,
        norms: Sequence[Norm],
        scale: float,
) -> Tuple[torch.Tensor, _State, _Kept]:
    strips = _Strips(attn, weights)
    count = attn.numel() // attn.shape[1]
    affine: List[_Affine] = []
    moments: List[Optional[Moments]] = []

    def settle(mean: Optional[torch.Tensor] = None, spread: Optional[torch.Tensor] = None) -> None:
        found = _settle(norms[len(affine)], count, mean, spread)
        affine.append(found[0])
        moments.append(found[1])

    mean = scatter = None
    if norms[0].mean is None:
        mean = attn.mean(dim=(0, 2, 3))
        scatter = attn.new_zeros(attn.shape[1], attn.shape[1])
        for strip in strips:
            x = (strips.maps(*strip) - mean[:, None, None]).flatten(2)
            scatter += torch.bmm(x, x.transpose(1, 2)).sum(dim=0)
        expand = strips.expand
        settle(expand @ mean, ((expand @ scatter) * expand).sum(dim=1))
    else:
        settle()

    if norms[1].mean is None:
        statistics = _Statistics()
        for _, x in strips.keep(affine[0]):
            statistics.add(x)
        settle(*statistics.total()[1:])
    else:
        settle()

    kept = _Kept(strips.kept, None, None, None)
    terms = None
    out = torch.empty_like(value, memory_format=torch.contiguous_format)
    # M = outer * (A + inner * R) + shift, and the shift of all entries alike is one of the product
    if norms[2].mean is None or norms[3].mean is None:
        of_attn: Optional[Tuple[torch.Tensor, torch.Tensor]] = None  # mean and spread, for BN4's statistics
        if norms[3].mean is None:
            if mean is not None and scatter is not None:
                of_attn = mean, scatter.diagonal()
            else:
                statistics = _Statistics()
                for strip in strips:
                    statistics.add(strips.maps(*strip))
                of_attn = statistics.total()[1:]
        reduced = torch.empty_like(attn)
        joint = attn.new_zeros(attn.shape[1])
        statistics = _Statistics()
        for images, low, high in strips:
            x = strips.reduced(strips.activated(strips.expanded(images, low, high, affine[0]), affine[1]))
            reduced[images, :, low:high] = x
            statistics.add(x)
            if of_attn is not None:
                joint += _inner(strips.maps(images, low, high) - of_attn[0][:, None, None], x)
        _, reduced_mean, reduced_spread = statistics.total()
        settle(reduced_mean, reduced_spread)
        third = affine[2]
        if of_attn is not None:
            attn_mean, attn_spread = of_attn
            terms = _Terms(attn_mean, reduced_mean, reduced_spread, joint)
            settle(
                attn_mean + third.gain * reduced_mean + third.shift,
                attn_spread + third.gain * (2. * joint + third.gain * reduced_spread))
        else:
            settle()
        attn_value, reduced_value = attn @ value, reduced @ value
        kept = _Kept(strips.kept, reduced, attn_value, reduced_value)
        torch.addcmul(attn_value, reduced_value, third.gain[:, None, None], out=out)
    else:
        settle()
        settle()
        third = affine[2]
        for images, low, high in strips:
            x = strips.expanded(images, low, high, affine[0])
            x = strips.reduced(strips.activated(x, affine[1]), third.gain)
            x += strips.maps(images, low, high)
            out[images, :, low:high] = torch.matmul(x, value[images])
    fourth = affine[3]
    outer = (scale * fourth.gain)[:, None, None]
    shift = (scale * (fourth.gain * third.shift + fourth.shift))[:, None, None]
    out = torch.addcmul(shift * value.sum(dim=2, keepdim=True), out, outer)
    return out, _State(affine, moments, mean, scatter, terms), kept


def _per_map(x: torch.Tensor) -> torch.Tensor:
    return x[:, None, None]


def _input_gradient(norm: _Affine, s: torch.Tensor, sx: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """What the gradient of a norm's input is made of beside the gain: slope and constant of each map.

    Args:
        norm: The norm.
        s: Sum of its output's gradients over the batch.
        sx: Sum of their products with its normalised input.
    """
    slope = -norm.share * norm.gain * norm.rstd * sx
    return slope, -norm.share * norm.gain * s - slope * norm.mean


def _inner(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """Sum of products of two stacks of maps (b, C, rows, N), for each of the C maps."""
    return (x * y).sum(dim=(0, 2, 3))


class _RefinedProduct(torch.autograd.Function):
    """`refined_product` with a backward of its own."""

    @staticmethod
    def forward(ctx, scale, norms, attn, value, *parameters):
        weights, affine = Weights(*parameters[:3]), parameters[3:]
        norms = [norm._replace(weight=affine[2 * i], bias=affine[2 * i + 1]) for i, norm in enumerate(norms)]
        out, state, kept = _forward(attn, value, weights, norms, scale)
        ctx.save_for_backward(*kept, attn, value, *parameters)
        ctx.scale, ctx.norms, ctx.state = scale, [norm._replace(weight=None, bias=None) for norm in norms], state
        found = [x for moments in state.moments if moments is not None for x in moments]
        ctx.mark_non_differentiable(*found)
        return (out, *found)

    @staticmethod
    def backward(ctx, grad, *_):
        saved = ctx.saved_tensors
        kept, (attn, value), parameters = saved[:4], saved[4:6], saved[6:]
        with without_autocast(attn.device.type):
            # a graph of the gradients is wanted, or those of several outputs at once, by is_grads_batched
            if torch.is_grad_enabled() or torch._C._functorch.is_legacy_batchedtensor(grad):
                grads = _differentiable_backward(ctx, grad, attn, value, parameters)
            else:
                weights = Weights(*parameters[:3])
                grads = _backward(grad, attn, value, weights, ctx.norms, ctx.state, _Kept(*kept), ctx.scale)
        return (None, None, *grads)


def _differentiable_backward(ctx, grad, attn, value, parameters):
    if any(norm.group is not None for norm in ctx.norms):
        raise RuntimeError('A second derivative through statistics that processes share (SyncBatchNorm) is not there.')
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad():
        # views, for a value may have come from the maps: gradients end here and do not go that way
        inputs = [x.view_as(x) for x in (attn, value, *parameters)]
        parameters = inputs[2:]
        norms = [norm._replace(weight=parameters[3 + 2 * i], bias=parameters[4 + 2 * i])
                 for i, norm in enumerate(ctx.norms)]
        out = refine_plain(inputs[0], Weights(*parameters[:3]), norms, ctx.scale) @ inputs[1]
    wanted = [i for i in range(len(inputs)) if ctx.needs_input_grad[2 + i]]
    grads: List[Optional[torch.Tensor]] = [None] * len(inputs)
    for i, g in zip(wanted, torch.autograd.grad(out, [inputs[i] for i in wanted], grad, create_graph=create_graph)):
        grads[i] = g
    return grads


def _backward(
        grad: torch.Tensor,
        attn: torch.Tensor,
        value: torch.Tensor,
        weights: Weights,
        norms: Sequence[Norm],
        state: _State,
        kept: _Kept,
        scale: float,
) -> List[torch.Tensor]:
    """Gradients of attn, value, the three convolutions, and weight and bias of each norm.

    In the names, s is a sum of gradients over all entries of a map, and sx one of their products with the normalised x.
    The gradient of a norm's input is `gain * g + slope * x + constant`, see `_input_gradient`.
    """
    first, second, third, fourth = state.affine
    strips = _Strips(attn, weights, halo=2)
    N = attn.shape[2]
    count = attn.numel() // attn.shape[1]
    grad = grad.contiguous()

    def total(i: int, *sums: torch.Tensor) -> List[torch.Tensor]:
        return _all_sum(norms[i].group if norms[i].mean is None else None, *sums)

    # the sums that BN4 and BN3 need. The gradient of M, grad value^T, is not made for them: its products with maps are
    # those of grad and the maps times the values.
    strips.kept = kept.expanded
    reduced, attn_value, reduced_value = kept[1:]
    if reduced is None or attn_value is None or reduced_value is None:
        reduced = torch.empty_like(attn)
        for (images, low, high), x in strips.keep(first):
            reduced[images, :, low:high] = strips.reduced(strips.activated(x, second))
        attn_value, reduced_value = attn @ value, reduced @ value
    elif strips.kept is None:
        for _ in strips.keep(first):
            pass
    grad_sum, value_sum = grad.sum(dim=2, keepdim=True), value.sum(dim=2, keepdim=True)
    grad_value = torch.matmul(attn.transpose(-2, -1), grad)
    grad_value.addcmul_(torch.matmul(reduced.transpose(-2, -1), grad), _per_map(third.gain))
    shift = fourth.gain * third.shift + fourth.shift
    grad_value = scale * torch.addcmul(_per_map(shift) * grad_sum, grad_value, _per_map(fourth.gain))
    s4 = scale * (grad_sum * value_sum).sum(dim=(0, 2, 3))
    s_reduced = scale * _inner(grad, reduced_value)
    s_x3 = third.rstd * (s_reduced - third.mean * s4)
    sx4 = fourth.rstd * (scale * _inner(grad, attn_value) + third.gain * s_reduced + (third.shift - fourth.mean) * s4)
    s4_all, sx4_all = total(3, s4, sx4)
    # BN3's output has the gradient of BN4's input; its sums follow
    s3, sx3 = fourth.gain * s4, fourth.gain * s_x3
    if state.terms is not None:
        terms = state.terms
        off3 = terms.mean_reduced - third.mean  # not 0 where statistics are of more than one process, or fixed
        off4 = terms.mean + third.gain * terms.mean_reduced + third.shift - fourth.mean
        x3_sum, x4_sum = count * third.rstd * off3, count * fourth.rstd * off4
        x34 = third.rstd * fourth.rstd * (terms.joint + third.gain * terms.spread_reduced + count * off3 * off4)
        s3 -= fourth.gain * fourth.share * (count * s4_all + x4_sum * sx4_all)
        sx3 -= fourth.gain * fourth.share * (x3_sum * s4_all + x34 * sx4_all)
    s3_all, sx3_all = total(2, s3, sx3)

    # first pass: W3 and the sums that BN2 needs
    grads = attn.new_empty(attn.shape[0], strips.expand.shape[0], N, N)  # of BN2's output
    grad_reduce = torch.zeros_like(strips.reduce)
    s2, sx2 = (attn.new_zeros(strips.expand.shape[0]) for _ in range(2))
    bias3 = torch.zeros_like(s3)  # s3, with less rounding: it vanishes where BN4 has the batch's statistics
    slope4, constant4 = _input_gradient(fourth, s4_all, sx4_all)
    slope3, constant3 = _input_gradient(third, s3_all, sx3_all)
    grad_attn = torch.matmul(scale * _per_map(fourth.gain) * grad, value.transpose(-2, -1))
    for images, low, high in strips:
        g, r = grad_attn[images, :, low:high], reduced[images, :, low:high]
        if fourth.share != 0.:
            g.add_(torch.addcmul(
                _per_map(slope4 * third.shift + constant4), r, _per_map(slope4 * third.gain),
            ).addcmul_(strips.maps(images, low, high), _per_map(slope4)))
        bias3 += g.sum(dim=(0, 2, 3))
        g = torch.addcmul(_per_map(constant3), g, _per_map(third.gain))
        if third.share != 0.:
            g.addcmul_(r, _per_map(slope3))
        x = strips.expanded(images, low, high, first)
        y = strips.activated(x, second)
        grad_reduce += torch.bmm(g.flatten(2), y.flatten(2).transpose(1, 2)).sum(dim=0)
        g = torch.bmm(strips.reduce.t().expand(len(g), -1, -1), g.flatten(2)).view_as(y)
        g = torch.ops.aten.hardtanh_backward.grad_input(g, y, 0., 6., grad_input=grads[images, :, low:high])
        s2 += g.sum(dim=(0, 2, 3))
        sx2 += _inner(g, x)
    sx2 = second.rstd * (sx2 - second.mean * s2)
    s2_all, sx2_all = total(1, s2, sx2)

    # second pass: D, W1 and A
    grad_depthwise = torch.zeros_like(weights.depthwise)
    s1 = attn.new_zeros(strips.expand.shape[0])
    cross = torch.zeros_like(strips.expand)  # gradient of BN1's output times A
    flipped = weights.depthwise.flip(2, 3)
    back = (first.gain[:, None] * strips.expand).t()
    slope2, constant2 = _input_gradient(second, s2_all, sx2_all)
    for images, low, high in strips:
        top, bottom = max(low - 1, 0), min(high + 1, N)  # rows of D's output that see the strip
        own = slice(low - top, high - top)
        inputs = strips.hidden(images, top, bottom, first)
        g = torch.addcmul(_per_map(constant2), grads[images, :, top:bottom], _per_map(second.gain))
        if second.share != 0.:
            g.addcmul_(strips.expanded(images, top, bottom, first), _per_map(slope2))
        padded = inputs
        if bottom - top != high - low + 2:
            padded = F.pad(inputs, (0, 0, 1 - (low - top), 1 - (bottom - high)))
        grad_depthwise += torch.ops.aten.convolution_backward(
            g[:, :, own], padded, weights.depthwise, None, [1, 1], [0, 1], [1, 1], False, [0, 0], padded.shape[1],
            [False, True, False])[1]
        g = F.conv2d(g, flipped, padding=1, groups=g.shape[1])[:, :, own]
        g = torch.ops.aten.hardtanh_backward(g, inputs[:, :, own], 0., 6.)
        s1 += g.sum(dim=(0, 2, 3))
        g = g.flatten(2)
        cross += torch.bmm(g, strips.maps(images, low, high).flatten(2).transpose(1, 2)).sum(dim=0)
        g = torch.bmm(back.expand(len(g), -1, -1), g).unflatten(2, (high - low, N))
        grad_attn[images, :, low:high] += g
    expand = strips.expand
    sx1 = first.rstd * ((expand * cross).sum(dim=1) - first.mean * s1)
    grad_expand = first.gain[:, None] * cross
    if state.mean is not None and state.scatter is not None:
        # what BN1's statistics do to A and W1, both by way of matrices of h x h
        s1_all, sx1_all = total(0, s1, sx1)
        slope1, constant1 = _input_gradient(first, s1_all, sx1_all)
        sums = count * state.mean
        products = state.scatter + torch.outer(state.mean, sums)
        grad_expand += slope1[:, None] * (expand @ products) + torch.outer(constant1, sums)
        matrix, shift = expand.t() @ (slope1[:, None] * expand), expand.t() @ constant1
        for images, low, high in strips:
            maps = strips.maps(images, low, high)
            x = torch.bmm(matrix.expand(len(maps), -1, -1), maps.flatten(2))
            grad_attn[images, :, low:high] += x.add_(shift[:, None]).view_as(maps)
    return [
        grad_attn, grad_value, grad_expand.view_as(weights.expand), grad_depthwise, grad_reduce.view_as(weights.reduce),
        sx1, s1, sx2, s2, sx3, bias3, sx4, s4]
