"""Models for other runtimes."""
from .onnx import MIN_OPSET, PRECISIONS, export_onnx
from .rewrite import rewrite_for_runtimes

__all__ = ['MIN_OPSET', 'PRECISIONS', 'export_onnx', 'rewrite_for_runtimes']
