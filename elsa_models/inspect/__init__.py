"""Looking into models: multiply-accumulates, attention maps."""
from .attention import AttentionLayer, attention_layers, has_local_attention
from .macs import count_macs, count_macs_by_op

__all__ = ['AttentionLayer', 'attention_layers', 'count_macs', 'count_macs_by_op', 'has_local_attention']
