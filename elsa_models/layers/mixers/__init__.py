from .axial import AxialAttention
from .elsa import ElsaAttention
from .focal import FocalAttention
from .gsa import GlobalSelfAttention
from .lg import LocalGlobalAttention
from .mixer import Mixer
from .window import WindowAttention
