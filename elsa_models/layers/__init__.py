from .elsa import ElsaAttention, ElsaBlock
from .patch import PaddedPatchEmbed, PaddedPatchMerging, pad_map
from .window import WindowBlock
