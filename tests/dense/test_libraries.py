"""Our names in libraries that take timm's backbones."""
import pytest
import timm
import torch

import elsa_models  # noqa: F401
from elsa_models.dense import DenseBackbone
from elsa_models.models._saving import save_folder


def test_transformers_wrapper():
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmWrapperConfig(architecture='test_elsa_swin', num_labels=5)
    model = transformers.TimmWrapperForImageClassification(config).eval()
    x = torch.randn(2, 3, 64, 64)
    plain = timm.create_model('test_elsa_swin', num_classes=5).eval()
    plain.load_state_dict({k.removeprefix('timm_model.'): v for k, v in model.state_dict().items()})
    assert torch.allclose(model(x).logits, plain(x), atol=1e-5)


def test_transformers_wrapper_loads_a_saved_model(tmp_path):
    transformers = pytest.importorskip('transformers')
    plain = timm.create_model('test_elsa_swin', num_classes=5).eval()
    save_folder(plain, tmp_path / 'model', {})
    model = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path / 'model').eval()
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model(x).logits, plain(x), atol=1e-5)


@pytest.mark.parametrize('name, strides', [('test_elsa_swin', (4, 8, 16, 32)), ('test_elsa_volo', (4, 8, 8, 8))])
def test_transformers_backbone(name, strides):
    transformers = pytest.importorskip('transformers')
    config = transformers.TimmBackboneConfig(
        backbone=name, features_only=True, out_indices=[0, 1, 2, 3], output_stride=None)
    model = transformers.TimmBackbone(config, dynamic_img_size=True).eval()
    maps = model(torch.randn(1, 3, 64, 96)).feature_maps
    rows = [m.shape[1] if 'swin' in name else m.shape[2] for m in maps]
    assert rows == [64 // s for s in strides]


@pytest.mark.parametrize('decoder', ['upernet', 'unet', 'fpn', 'manet'])
def test_segmentation_models(decoder):
    smp = pytest.importorskip('segmentation_models_pytorch')
    model = smp.create_model(
        decoder, 'tu-test_elsa_swin', encoder_weights=None, classes=5, dynamic_img_size=True).eval()
    assert model(torch.randn(1, 3, 64, 96)).shape == (1, 5, 64, 96)


def test_torchvision_pyramid():
    from torchvision.ops import FeaturePyramidNetwork
    backbone = DenseBackbone('test_elsa_swin').eval()
    fpn = FeaturePyramidNetwork(list(backbone.channels), 16)
    maps = fpn(dict(enumerate(backbone(torch.randn(1, 3, 33, 47)))))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 16, 9, 12), (1, 16, 5, 6), (1, 16, 3, 3), (1, 16, 2, 2)]
