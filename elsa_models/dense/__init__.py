"""Dense prediction: backbones, detectors and segmenters on torchvision and segmentation_models_pytorch."""
from .features import DenseBackbone, VoloPyramid

__all__ = ['DenseBackbone', 'VoloPyramid']
