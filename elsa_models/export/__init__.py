"""Models for other runtimes."""
from .onnx import MIN_OPSET, PRECISIONS, export_onnx
from .rewrite import rewrite_for_runtimes
