from .axial import AxialAttention
from .elsa import ElsaAttention
from .gsa import GlobalSelfAttention
from .mixer import Mixer
from .window import WindowAttention
