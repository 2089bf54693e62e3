from .elsa import ElsaAttention
from .mixer import Mixer
from .window import WindowAttention
