"""What can be trained: one module for each job."""
from importlib import import_module
from typing import Type

from ..._extras import require
from ..job import Job

_JOBS = {  # class, and what its module needs: a package and the extra that brings it
    'classification': ('ClassificationJob', None),
    'detection': ('DetectionJob', ('pycocotools', 'detection')),
    'segmentation': ('SegmentationJob', ('segmentation_models_pytorch', 'segmentation')),
}


def load_job(name: str) -> Type[Job]:
    """A job by the name of its module.

    Raises:
        ImportError: A package that it needs is not installed; says what to install.
    """
    kind, needs = _JOBS[name]
    if needs is not None:
        require(*needs)
    return getattr(import_module(f'{__name__}.{name}'), kind)
