from .elsa import ElsaAttention, ElsaBlock
from .patch import PaddedPatchEmbed, PaddedPatchMerging, check_size, pad_map
from .window import WindowBlock
