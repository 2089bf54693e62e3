"""The numerical core: operators on the K x K neighbours of every pixel, one folder each.

An operator's folder has `api.py`, the public function with its checks; `reference.py`, the formula; a file for every
backend; `plain.py`, core operators for graphs that leave PyTorch; `flops.py`, its cost. `backends.py` knows all
operators and chooses their backends.
"""
import os

from .backends import available_backends, explain_backend, get_backend, set_backend
from .local_attention import local_attention, local_attention_plain, local_attention_reference
from .local_logits import local_logits, local_logits_plain, local_logits_reference

__all__ = [
    'available_backends', 'explain_backend', 'get_backend', 'local_attention', 'local_attention_plain',
    'local_attention_reference', 'local_logits', 'local_logits_plain', 'local_logits_reference', 'set_backend',
]

set_backend(os.environ.get('ELSA_BACKEND') or 'auto')
