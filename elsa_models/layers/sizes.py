"""Sizes: whether they may decide what a graph does, padding, checks and what is resampled to them.

Sizes are rounded up as `(H + p - 1) // p`, never by a remainder: where they are symbolic (torch.compile, export), a
chain of remainders through the stages takes minutes to simplify.
"""
import torch
import torch.nn.functional as F
from timm.layers import resample_abs_pos_embed_nhwc

from ..ops._graphs import is_exporting


def sizes_are_open() -> bool:
    """Whether sizes are symbols of a graph in the making, whose values must not decide what the graph does."""
    if torch.jit.is_scripting():
        return False
    return _is_graph_in_the_making()


def sizes_are_known() -> bool:
    """Whether sizes can be compared with what they must be: not while torch.jit.trace makes tensors of them."""
    if torch.jit.is_scripting():
        return True
    return not _is_traced()


@torch.jit.unused
def _is_graph_in_the_making() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


@torch.jit.unused
def _is_traced() -> bool:
    return torch.jit.is_tracing()


def pad_map(x: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Pad maps (B, h, w, C) with zeros to (B, H, W, C)."""
    extra_h, extra_w = H - x.shape[1], W - x.shape[2]
    if not sizes_are_open() and extra_h == 0 and extra_w == 0:
        return x  # F.pad would copy
    return F.pad(x, (0, 0, 0, extra_w, 0, extra_h))


def _cubic_weights(size: int, new_size: int, device: torch.device) -> torch.Tensor:
    # new_size, size: the weights of torch's antialiased bicubic interpolation, Keys' kernel with a = -1/2
    step = size / torch.scalar_tensor(new_size, dtype=torch.float32, device=device)
    centers = (torch.arange(new_size, dtype=torch.float32, device=device) + .5) * step
    x = ((torch.arange(size, dtype=torch.float32, device=device) + .5 - centers[:, None]) / step.clamp(min=1)).abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-.5 * x + 2.5) * x - 4) * x + 2
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


def resample_positions(positions: torch.Tensor, H: int, W: int) -> torch.Tensor:
    """Resize a position embedding (1, h, w, C) to (1, H, W, C) as timm does.

    Exported, it is a product with the interpolation's weights on either side: of an antialiased bicubic Resize,
    OpenVINO makes something else, and most other runtimes nothing.
    """
    if not torch.jit.is_scripting():
        if is_exporting():
            rows = _cubic_weights(positions.shape[1], H, positions.device)
            columns = _cubic_weights(positions.shape[2], W, positions.device)
            x = (rows @ positions[0].float().flatten(1)).unflatten(1, (positions.shape[2], positions.shape[3]))
            return (columns @ x).to(positions.dtype).unsqueeze(0)  # columns, for each row
    return resample_abs_pos_embed_nhwc(positions, [H, W])


def check_size(H: int, W: int, expected_H: int, expected_W: int) -> None:
    """Require images of the model's size.

    Raises:
        ValueError: They are of another.
    """
    if sizes_are_known() and (H != expected_H or W != expected_W):
        raise ValueError(
            f'input: got {H} x {W} pixels, must be {expected_H} x {expected_W}. set_input_size() changes the size, '
            f'a model created with dynamic_img_size=True takes any.')
