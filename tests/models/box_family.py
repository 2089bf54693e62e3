"""A mixer and a family as somebody would write them who adds one to the package: this file is all of it."""
import torch.nn as nn
from timm.models import generate_default_cfgs, register_model

from elsa_models.layers import Mixer
from elsa_models.models import Family, register_family
from elsa_models.models._checkpoint import build_model
from elsa_models.models._swin_like import SwinLike


class BoxMixer(Mixer):
    def __init__(self, dim, num_heads, device=None, dtype=None):
        super().__init__()
        self.box = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def extra_macs(self, shape):
        return {'gate': shape[0] * shape[1] * shape[2] * shape[3]}

    def forward(self, x):
        return x * self.proj(self.box(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class BoxSwin(SwinLike):
    def __init__(self, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), **kwargs):
        def mixer(dim, num_heads, index, feat_size, **dd):
            return BoxMixer(dim, num_heads, **dd)
        super().__init__([mixer] * len(depths), depths, num_heads, **kwargs)


default_cfgs = generate_default_cfgs({
    'test_box_swin': dict(
        num_classes=1000, input_size=(3, 64, 64), pool_size=(2, 2), fixed_input_size=True, mean=(.5,) * 3,
        std=(.5,) * 3, first_conv='patch_embed.proj', classifier='head.fc', paper_name='None', license='apache-2.0'),
})


@register_model
def test_box_swin(pretrained=False, **kwargs):
    """A small network of boxes: 1 M parameters, 64 pixels."""
    features = dict(flatten_sequential=True, out_indices=(0, 1, 2, 3))
    args = dict(img_size=64, embed_dim=24, feature_cfg=features)
    return build_model(BoxSwin, 'test_box_swin', pretrained, **dict(args, **kwargs))


register_family(Family(
    name='box_swin',
    module=__name__,
    model_cls=BoxSwin,
    relatives={'test_box_swin': 'swin_tiny_patch4_window7_224.ms_in1k'},
    marks=('box.weight',),
    top1=dict(test_box_swin=99.),
))
