"""Models at work on images: what needs no training and does not import it."""
from .._images import DataError, find_images
from . import figures
from .classifier import Answer, Classifier, ModelError, classify, find_device, load_classifier

__all__ = [
    'Answer', 'Classifier', 'DataError', 'ModelError', 'classify', 'figures', 'find_device', 'find_images',
    'load_classifier',
]
