"""Maps of strides 4, 8, 16 and 32 from hierarchical backbones of timm, as detectors and segmenters want them."""
from typing import Any, Dict, List, Optional, Tuple

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F

from ..layers.sizes import sizes_are_open
from ..models import DEFAULT_MODEL
from ..models._family import arguments_of, family_of
from ..models._warm_start import warm_start as start_from_relative

STRIDES = (4, 8, 16, 32)


class SimplePyramid(nn.Module):
    """Maps of strides 4, 8, 16 and 32 from those of 8 and 16.

    As in `Exploring Plain Vision Transformer Backbones for Object Detection` - https://arxiv.org/abs/2203.16527: a
    transposed convolution makes the finest, max pooling the coarsest.
    """

    def __init__(self, channels: Tuple[int, int]) -> None:
        """
        Args:
            channels: Channels of the maps of strides 8 and 16.
        """
        super().__init__()
        fine, coarse = channels
        self.up = nn.ConvTranspose2d(fine, fine, 2, stride=2)
        self.channels = (fine, fine, coarse, coarse)

    def forward(self, fine: torch.Tensor, coarse: torch.Tensor, height: int, width: int) -> List[torch.Tensor]:
        """Four maps (B, C, h, w), whose sides are those of the image, divided by the stride and rounded up.

        Args:
            fine: Map of stride 8, (B, C, h, w).
            coarse: Map of stride 16, (B, C', h', w').
            height: Height of the image in pixels.
            width: Width of the image in pixels.
        """
        finest, height, width = self.up(fine), (height + 3) // 4, (width + 3) // 4
        if sizes_are_open():  # a crop is a view, and a graph would hold for those sizes only that need one
            rows, columns = torch.arange(height, device=fine.device), torch.arange(width, device=fine.device)
            finest = finest.index_select(2, rows).index_select(3, columns)
        else:
            finest = finest[:, :, :height, :width]
        return [finest, fine, coarse, F.max_pool2d(coarse, 2, ceil_mode=True)]


class DenseBackbone(nn.Module):
    """A backbone of timm that takes images of any size and returns four maps, each with a LayerNorm of its own.

    Of models with more maps than the four, or several of one stride, the last of each stride are taken. Those whose
    maps are of strides 8 and 16 go through a `SimplePyramid`. Windows are cut on every map, as the detection code of
    Swin's authors does (`always_partition`), and families have settings of their own for dense tasks, such as
    `pad_before_shift` of `elsa_swin_tiny`; `model_args` can say otherwise. The norms are `norm0` to `norm3`.

    Attributes:
        architecture: Name of the model.
        channels: Channels of each map.
    """

    def __init__(
            self,
            model: str = DEFAULT_MODEL,
            pretrained: bool = False,
            checkpoint: Optional[str] = None,
            warm_start: Optional[str] = None,
            norms: bool = True,
            frozen_stages: int = 0,
            output_fmt: str = 'NCHW',
            model_args: Optional[Dict[str, Any]] = None,
    ) -> None:
        """
        Args:
            model: timm's name of a model with maps of strides 4, 8, 16 and 32, or of 8 and 16.
            pretrained: Start from the model's weights.
            checkpoint: Start from the weights of a classifier in this file.
            warm_start: Start from what a related model shares with this one, see `elsa_models.warm_start`; the rest is
                as `pretrained` or `checkpoint` says.
            norms: Give each map a LayerNorm.
            frozen_stages: 0 trains everything, 1 keeps the patch embedding as it is, n + 1 the first n stages too.
            output_fmt: 'NCHW' or 'NHWC'.
            model_args: Further arguments of the model.

        Raises:
            ValueError: The model has other strides, or a value is none of those above.
        """
        super().__init__()
        if output_fmt not in ('NCHW', 'NHWC'):
            raise ValueError(f"output_fmt: got {output_fmt!r}, must be 'NCHW' or 'NHWC'.")
        self.output_fmt = output_fmt
        self.architecture = model
        args = dict(model_args or {})
        with torch.device('meta'):
            probe = timm.create_model(model, **args)
        family, known = family_of(probe), arguments_of(type(probe))
        for name in ('dynamic_img_size', 'always_partition'):
            if name in known:
                args.setdefault(name, True)
        for name, value in family.dense_args.items() if family is not None else ():
            args.setdefault(name, value)
        reductions = [info['reduction'] for info in probe.feature_info]
        last = {r: i for i, r in enumerate(reductions) if r in STRIDES}
        if len(last) > 1 and len(last) < len(reductions):
            args['out_indices'] = tuple(last.values())
        weights: Dict[str, Any] = dict(pretrained=pretrained)
        if checkpoint is not None:
            weights = dict(pretrained=True, pretrained_cfg_overlay=dict(file=checkpoint))
        if warm_start is not None:
            relative = timm.create_model(model, **weights, **{'num_classes': 0, **(model_args or {})})
            start_from_relative(relative, warm_start)
            weights = dict(pretrained=True, pretrained_cfg_overlay=dict(state_dict=relative.state_dict()))
        self.body = timm.create_model(model, features_only=True, **weights, **args)
        self._is_nhwc = getattr(self.body, 'output_fmt', 'NCHW') == 'NHWC'
        channels, strides = self.body.feature_info.channels(), tuple(self.body.feature_info.reduction())
        self.pyramid = None
        if strides == STRIDES[1:3]:
            self.pyramid = SimplePyramid(channels)
            channels = self.pyramid.channels
        elif strides != STRIDES:
            raise ValueError(f'model: {model!r} has maps of strides {strides}, must be {STRIDES}.')
        self.channels = tuple(channels)
        for i, width in enumerate(self.channels):
            setattr(self, f'norm{i}', nn.LayerNorm(width) if norms else nn.Identity())
        most = 1 + len(self._parts()[1])
        if not 0 <= frozen_stages <= most:
            raise ValueError(f'frozen_stages: got {frozen_stages}, must be from 0 to {most}.')
        self.frozen_stages = frozen_stages
        for module in self._frozen():
            module.requires_grad_(False)

    def _parts(self) -> Tuple[List[nn.Module], List[List[nn.Module]]]:
        """The modules before the first stage, and those of each stage."""
        if hasattr(self.body, 'return_layers'):  # the modules in the order of their running
            stages: List[List[nn.Module]] = [[]]
            for name, module in self.body.items():
                stages[-1].append(module)
                if name in self.body.return_layers:
                    stages.append([])
            first = stages[0]
            return first[:-1], [first[-1:], *stages[1:-1]]
        model = self.body.model  # it has its stages in a list
        places = [info['module'].rpartition('.') for info in model.feature_info]
        modules = model.get_submodule(places[0][0])
        ends = [int(index) for _, _, index in places if int(index) < len(modules)]
        children = [module for _, module in model.named_children()]
        stem = children[:next(i for i, m in enumerate(children) if m is modules)]
        return stem, [list(modules[start + 1:end + 1]) for start, end in zip([-1, *ends], ends)]

    def _frozen(self) -> List[nn.Module]:
        if self.frozen_stages == 0:
            return []
        stem, stages = self._parts()
        return stem + [m for stage in stages[:self.frozen_stages - 1] for m in stage]

    def train(self, mode: bool = True) -> 'DenseBackbone':
        """Set the mode of all but the frozen stages, which stay in evaluation mode."""
        super().train(mode)
        for module in self._frozen():
            module.eval()
        return self

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Compute activations twice instead of keeping them."""
        for module in self.body.modules():
            if hasattr(module, 'grad_checkpointing') and module is not self.body:
                module.grad_checkpointing = enable

    @torch.jit.ignore
    def no_weight_decay(self) -> Tuple[str, ...]:
        """Position tables, as in the authors' recipes of detection and segmentation."""
        ends = ('relative_position_bias_table', 'pos_embed')
        return tuple(name for name, _ in self.named_parameters() if name.endswith(ends))

    def forward(self, x: torch.Tensor) -> List[torch.Tensor]:
        """Map images (B, in_chans, H, W) to four maps of strides 4, 8, 16 and 32, their sides rounded up.

        Returns:
            Maps (B, C, h, w), or (B, h, w, C) if output_fmt is 'NHWC'.
        """
        maps = self.body(x)
        if self.pyramid is not None:
            maps = self.pyramid(maps[0], maps[1], x.shape[-2], x.shape[-1])
        if not self._is_nhwc:
            maps = [m.permute(0, 2, 3, 1) for m in maps]
        maps = [norm(m) for norm, m in zip((self.norm0, self.norm1, self.norm2, self.norm3), maps)]
        if self.output_fmt == 'NCHW':
            maps = [m.permute(0, 3, 1, 2).contiguous() for m in maps]
        return maps
