"""What timm's classes of the same shape have and can do, ours have and can: what timm adds to them shows here."""
import timm
from timm.models.byobnet import ByobNet
from timm.models.swin_transformer import SwinTransformer
from timm.models.volo import VOLO

import elsa_models  # noqa: F401  registers the models
from elsa_models.models import ElsaSwin, ElsaVolo
from elsa_models.models._resnet import MixerResNet

# what timm's builder adds to a model
BY_THE_BUILDER = {'_traits', '_model_args', 'pretrained_cfg', 'default_cfg', 'pretrained_model_args'}
VOLO_ARGS = dict(
    layers=(1, 1), embed_dims=(8, 8), num_heads=(1, 1), downsamples=(True, False), outlook_attention=(True, False))


def _missing(ours, timms, ours_cls, timms_cls):
    attributes = set(vars(timms)) | set(timms._modules) | set(timms._parameters)
    own = set(vars(ours)) | set(ours._modules) | set(ours._parameters)
    methods = {n for n in dir(timms_cls) if not n.startswith('__')}
    return attributes - own, methods - set(dir(ours_cls))


def test_swin():
    args = dict(depths=(1, 1), num_heads=(1, 1), embed_dim=8, device='meta')
    assert _missing(ElsaSwin(**args), SwinTransformer(**args), ElsaSwin, SwinTransformer) == (set(), set())


def test_volo():
    ours = ElsaVolo(layers=(1, 1), embed_dims=(8, 8), num_heads=(1, 1), downsamples=(True, False),
                    local_stages=(True, False), group_width=2, device='meta')
    attributes, methods = _missing(ours, VOLO(**VOLO_ARGS, device='meta'), ElsaVolo, VOLO)
    assert attributes == set()
    assert methods == {'_init_weights'}  # init_weights() is that of timm's vision transformers


def test_resnet():
    timms = timm.create_model('botnet26t_256', device='meta')
    assert isinstance(timms, ByobNet)
    ours = MixerResNet([[None]] * 4, device='meta')
    attributes, methods = _missing(ours, timms, MixerResNet, ByobNet)
    assert attributes == BY_THE_BUILDER and methods == set()
