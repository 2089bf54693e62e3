"""A released model of a size that tests can download, beside those of the package."""
from timm.models import generate_default_cfgs, register_model

from elsa_models.models.elsa_swin import _cfg, _create_elsa_swin

FILE_ID = 'authors_file'
NAME = 'small_released.authors'

default_cfgs = generate_default_cfgs({
    NAME: _cfg(url=f'https://drive.google.com/uc?id={FILE_ID}', input_size=(3, 32, 32), pool_size=(1, 1)),
})


@register_model
def small_released(pretrained=False, **kwargs):
    """An ELSA-Swin of 45 k parameters, 32 pixels."""
    model_args = dict(
        img_size=32, embed_dim=8, depths=(1, 1, 1, 2), num_heads=(1, 1, 2, 2), group_width=4, kernel_size=3,
        window_size=2)
    return _create_elsa_swin('small_released', pretrained, **dict(model_args, **kwargs))
