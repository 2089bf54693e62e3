from .block import ElsaBlock, MixerBlock
from .mixers import AxialAttention, ElsaAttention, GlobalSelfAttention, Mixer, WindowAttention
from .sizes import check_size, pad_map, sizes_are_open
from .stems import PaddedConvStem, PaddedDownsample, PaddedPatchEmbed, PaddedPatchMerging
