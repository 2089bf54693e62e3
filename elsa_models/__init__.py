"""Enhanced Local Self-Attention backbones for timm. Importing the package registers every model."""
from . import models
from ._version import __version__
from .export import export_onnx
from .hub import WeightsError, get_hub_namespace, load_weights, set_hub_namespace
from .layers import ElsaAttention, ElsaBlock
from .layers.batch_norm import reestimate_batch_norm
from .models import ElsaSwin, ElsaVolo, RefinerVit, token_label_loss, warm_start, warm_up
from .ops import (
    available_backends,
    explain_backend,
    get_backend,
    local_attention,
    local_attention_reference,
    set_backend,
)

__all__ = [
    'ElsaAttention', 'ElsaBlock', 'ElsaSwin', 'ElsaVolo', 'RefinerVit', 'WeightsError', '__version__',
    'available_backends', 'explain_backend', 'export_onnx', 'get_backend', 'get_hub_namespace', 'load_weights',
    'local_attention', 'local_attention_reference', 'models', 'reestimate_batch_norm', 'set_backend',
    'set_hub_namespace', 'token_label_loss', 'warm_start', 'warm_up',
]
