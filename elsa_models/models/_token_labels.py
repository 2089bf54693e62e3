"""Token labels: classes for every token of an image, and the mixing of tokens of two images.

Paper: `All Tokens Matter: Token Labeling for Training Better Vision Transformers` - https://arxiv.org/abs/2104.10858
"""
from typing import NamedTuple, Optional, Tuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from timm.models.volo import rand_bbox

Box = Tuple[int, int, int, int]  # top, left, bottom, right in tokens
NO_BOX: Box = (0, 0, 0, 0)


class TokenLabelOutput(NamedTuple):
    """What a loss with token labels needs (`All Tokens Matter` - https://arxiv.org/abs/2104.10858, section 3)."""
    logits: torch.Tensor  # of the class token: B, num_classes
    token_logits: Optional[torch.Tensor]  # of each image's own tokens: B, h, w, num_classes; None without the aux head
    box: Box  # top, left, bottom, right in tokens: the part seen in place of the flipped batch's
    lam: float  # share of an image's tokens that are its own


def _draw_box(B: int, h: int, w: int, beta: float) -> Box:
    if B < 2:
        raise ValueError(
            f'x: got a batch of {B}, must be at least 2 images for MixToken. Drop the last batch, or set '
            f'use_mix_token=False.')
    share = torch.distributions.Beta(beta, beta).sample()
    return rand_bbox((B, h, w), share)  # type: ignore[arg-type]  # declared a float, and handed to torch.sqrt


def _swap_box(x: torch.Tensor, box: Box, scale: int = 1) -> torch.Tensor:
    """Take a box of maps (B, H, W, C), scale pixels a token, from the batch in reverse order. Its own inverse."""
    top, left, bottom, right = [side * scale for side in box]
    out = x.clone()
    out[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
    return out


class TokenLabelModel(nn.Module):
    """What models with an aux head, a classifier of every token, share: the forward pass of their training.

    They give maps (B, H, W, C) by `patch_embed` and normalised tokens, the class token first, by `forward_patches`.
    """
    patch_embed: nn.Module
    head: nn.Module  # classifier of the class token
    head_drop: nn.Module
    global_pool: str
    mix_token: bool  # mix the images of a batch
    beta: float  # the mixed share is drawn from Beta(beta, beta)
    pooling_scale: int  # patches per side of a token
    use_aux_head: bool  # as asked for; there is no aux_head without classes
    aux_head: Optional[nn.Module]

    def forward_patches(self, x: torch.Tensor) -> torch.Tensor:
        """Map patches (B, H, W, C) to normalised tokens (B, 1 + N, C'), the class token first."""
        raise NotImplementedError

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """Map tokens (B, 1 + N, C) to logits (B, num_classes), or to what the classifier takes."""
        raise NotImplementedError

    @torch.jit.ignore
    def forward_train(self, x: torch.Tensor) -> TokenLabelOutput:
        """Logits of the class token and of every token, for training with token labels.

        With use_mix_token and in training mode, a box of each image's patches, of the same place for all and drawn from
        torch's global generator, is replaced by that of the image at the mirrored position in the batch.

        Args:
            x: Images (B, in_chans, H, W).

        Returns:
            See `TokenLabelOutput`, which `token_label_loss` takes.

        Raises:
            ValueError: There is but one image to mix, or no pooled class logits.
        """
        if not self.global_pool:
            raise ValueError('global_pool: got \'\', forward_train() needs \'token\' or \'avg\'.')
        x = self.patch_embed(x)
        B, H, W, _ = x.shape
        scale = self.pooling_scale
        h, w = (H + scale - 1) // scale, (W + scale - 1) // scale
        box = NO_BOX
        if self.mix_token and self.training:
            box = _draw_box(B, h, w, self.beta)
            x = _swap_box(x, box, scale)
        x = self.forward_patches(x)
        logits = self.head(self.forward_head(x, pre_logits=True))
        token_logits = None
        if self.aux_head is not None:
            token_logits = self.aux_head(self.head_drop(x)[:, 1:]).unflatten(1, (h, w))
            token_logits = _swap_box(token_logits, box)
        lam = 1. - (box[2] - box[0]) * (box[3] - box[1]) / (h * w)
        return TokenLabelOutput(logits, token_logits, box, lam)


def _probabilities(
        name: str,
        target: torch.Tensor,
        shape: Tuple[int, ...],
        num_classes: int,
        dtype: torch.dtype,
) -> torch.Tensor:
    """Class indices of a shape, or probabilities with one more dimension, as probabilities."""
    if target.is_floating_point() and tuple(target.shape) == (*shape, num_classes):
        return target.to(dtype)
    is_index = not (target.is_floating_point() or target.is_complex() or target.dtype == torch.bool)
    if is_index and tuple(target.shape) == shape:
        return F.one_hot(target.long(), num_classes).to(dtype)
    raise ValueError(
        f'{name}: got shape {tuple(target.shape)} of {str(target.dtype)[6:]}, must be {shape} class indices of an '
        f'integer type or {(*shape, num_classes)} probabilities of a floating one.')


def token_label_loss(
        output: TokenLabelOutput,
        target: torch.Tensor,
        dense_target: Optional[torch.Tensor] = None,
        dense_weight: float = 0.5,
        label_smoothing: float = 0.,
) -> torch.Tensor:
    """Cross entropy of the class token plus that of the tokens, with the classes of mixed images mixed alike.

    Labels are those of the images as loaded: what MixToken mixed, this function and `forward_train` account for.

    Source: `All Tokens Matter: Token Labeling for Training Better Vision Transformers`, equations 1 to 5.

    Args:
        output: Of a model's `forward_train`.
        target: (B,) class indices, or (B, num_classes) probabilities.
        dense_target: (B, h, w) class indices or (B, h, w, num_classes) probabilities, one per token;
            every token has its image's label if None.
        dense_weight: Weight of the tokens' loss.
        label_smoothing: Share of every label that is spread over all classes.

    Returns:
        The mean over the batch, a scalar.

    Raises:
        ValueError: A label's shape or dtype does not fit, or there are dense labels but no aux head.
    """
    logits, token_logits, _, lam = output
    B, num_classes = logits.shape
    target = _probabilities('target', target, (B,), num_classes, logits.dtype)
    mixed = target if lam == 1. else lam * target + (1. - lam) * target.flip(0)
    loss = F.cross_entropy(logits, mixed, label_smoothing=label_smoothing)
    if token_logits is None:
        if dense_target is not None:
            raise ValueError('dense_target: the model has no aux head, create it with use_aux_head=True.')
        return loss
    _, h, w, _ = token_logits.shape
    if dense_target is None:
        dense_target = target[:, None, None].expand(B, h, w, num_classes)
    dense_target = _probabilities('dense_target', dense_target, (B, h, w), num_classes, logits.dtype)
    dense_loss = F.cross_entropy(
        token_logits.flatten(0, 2), dense_target.flatten(0, 2), label_smoothing=label_smoothing)
    return loss + dense_weight * dense_loss
