"""Dense prediction: backbones, detectors and segmenters on torchvision and segmentation_models_pytorch."""
from .features import DenseBackbone, SimplePyramid

__all__ = ['DenseBackbone', 'SimplePyramid']
