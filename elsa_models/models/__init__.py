"""Families of models, registered with timm."""
from ._family import Family, families, family_of, register_family
from ._token_labels import TokenLabelModel, TokenLabelOutput, token_label_loss
from ._warm_start import WarmStartReport, warm_start
from ._warm_up import warm_up
from .axial_resnet import AxialResNet
from .elsa_swin import ElsaSwin
from .elsa_volo import ElsaVolo
from .focal_transformer import FocalTransformer
from .gsa_resnet import GsaResNet
from .keyonly_resnet import KeyOnlyResNet
from .lg_transformer import LGTransformer
from .mixer_swin import MixerSwin
from .refiner_vit import RefinerVit
from .sasa_resnet import SasaResNet

__all__ = [
    'AxialResNet', 'DEFAULT_MODEL', 'ElsaSwin', 'ElsaVolo', 'Family', 'FocalTransformer', 'GsaResNet',
    'KeyOnlyResNet', 'LGTransformer', 'MixerSwin', 'RefinerVit', 'SMALL_MODEL', 'SasaResNet', 'TokenLabelModel',
    'TokenLabelOutput', 'WarmStartReport', 'families', 'family_of', 'register_family', 'token_label_loss',
    'warm_start', 'warm_up',
]

# what is taken where none is named: for dense tasks, and to try things out
DEFAULT_MODEL, SMALL_MODEL = 'elsa_swin_tiny', 'test_elsa_swin'
