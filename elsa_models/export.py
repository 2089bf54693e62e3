"""Export to ONNX, checked in ONNX Runtime before the file appears."""
import logging
import os
import tempfile
from pathlib import Path
from typing import Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.layers import to_2tuple
from timm.models import get_model_input_config

_logger = logging.getLogger(__name__)

_TOLERANCE = 1e-4  # largest difference to PyTorch, in units of the largest output


def _require_onnx():
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as e:
        raise ImportError(f"ONNX export needs the package {e.name!r}: pip install 'elsa_models[onnx]'.") from e
    return onnxruntime


def export_onnx(
        model: nn.Module,
        path: Union[str, Path],
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        dynamic_batch: bool = True,
) -> Path:
    """Write a model to an ONNX file and see that ONNX Runtime agrees with PyTorch.

    The graph maps `image` (B, in_chans, H, W), normalised as the model expects, to `logits`. The file is written
    beside `path` and renamed only when it has passed the check, at batch 1 and 3 if the batch is dynamic.

    Args:
        model: A classification model of float32; its train/eval mode is left as it was.
        path: File to write; its folder must exist.
        img_size: Height and width in pixels, those of the model if None.
        dynamic_batch: Let the batch size vary; otherwise it is 1.

    Returns:
        The path.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        FileNotFoundError: The folder of `path` does not exist.
        RuntimeError: ONNX Runtime's outputs differ from PyTorch's by more than 1e-4 of their scale.
    """
    onnxruntime = _require_onnx()
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f'path: got {str(path)!r}, its folder does not exist.')
    in_chans, *size = get_model_input_config(model)['input_size']
    size = to_2tuple(img_size) if img_size is not None else tuple(size)
    device = next(model.parameters()).device
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(3, in_chans, *size, generator=generator)

    training = model.training
    model.eval()
    handle, temporary = tempfile.mkstemp(suffix='.onnx', prefix=f'.{path.stem}-', dir=path.parent)
    os.close(handle)
    try:
        # export specialises dimensions of size 1, so a dynamic batch is traced at 2
        example = images[:2 if dynamic_batch else 1].to(device)
        with torch.no_grad():
            torch.onnx.export(
                model,
                (example,),
                temporary,
                input_names=['image'],
                output_names=['logits'],
                dynamic_shapes=({0: torch.export.Dim('batch')},) if dynamic_batch else None,
                dynamo=True,
                external_data=False,
                verbose=False,
            )
            _check(onnxruntime, temporary, model, [images[:1], images] if dynamic_batch else [images[:1]])
        os.replace(temporary, path)
    finally:
        model.train(training)
        if os.path.exists(temporary):
            os.remove(temporary)
    _logger.info('exported %s, %.1f MB', path, path.stat().st_size / 1e6)
    return path


def _check(onnxruntime, path: str, model: nn.Module, batches) -> None:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    device = next(model.parameters()).device
    for images in batches:
        expected = model(images.to(device)).cpu()
        found = torch.from_numpy(session.run(None, {'image': images.numpy()})[0])
        error, scale = (found - expected).abs().max().item(), expected.abs().max().item()
        if not error <= _TOLERANCE * scale:
            raise RuntimeError(
                f'exported graph differs from the model by {error:.2e} at outputs of up to {scale:.2e},'
                f' batch {len(images)}; nothing was written.')
