from .elsa import ElsaAttention, ElsaBlock
from .patch_embed import PaddedPatchEmbed
from .window import WindowBlock
