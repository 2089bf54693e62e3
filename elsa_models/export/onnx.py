"""Export to ONNX, checked in ONNX Runtime before the file appears."""
import gc
import json
import logging
import os
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any, Dict, Iterable, Iterator, List, Optional, Sequence, Tuple, Union

import torch
import torch.nn as nn
from timm.data import create_transform, resolve_model_data_config
from timm.layers import to_2tuple
from timm.models import FeatureInfo, get_model_input_config

from .._extras import require
from .._files import temporary_folder
from .._images import DataError, denormalise, find_images, read_image
from .._modes import evaluating
from .resize import resize_matrices
from .rewrite import rewrite_for_runtimes

_logger = logging.getLogger(__name__)
_PLACE = ('file', 'source', 'cache_dir')  # entries of a pretrained_cfg

PRECISIONS = ('float32', 'float16', 'int8')
MIN_OPSET = 20  # Gelu

_TOLERANCE = {'float32': 1e-4, 'float16': 2e-2}  # largest difference to PyTorch, in units of the largest output
_TOLERANCE_INT8 = 0.2  # root of the mean squared difference, in units of that of the outputs
_MAX_PROTOBUF = 2 ** 31 - 2 ** 20  # bytes; larger weights go to a file of their own
_MAX_IMAGES = 128  # of the folder, evenly spaced


class _Preprocessed(nn.Module):
    """A model behind the resizing, scaling, normalisation and layout that its images need."""

    def __init__(
            self,
            model: nn.Module,
            data_config: Dict[str, Any],
            size: Tuple[int, int],
            resize_from: Optional[Tuple[int, int]],
    ) -> None:
        super().__init__()
        self.model = model
        mean, std = torch.tensor(data_config['mean']), torch.tensor(data_config['std'])
        self.register_buffer('scale', 1 / (255 * std))
        self.register_buffer('offset', -mean / std)
        self.resizes = resize_from is not None
        if resize_from is not None:
            rows, columns, margin = resize_matrices(resize_from, size, data_config)
            self.register_buffer('rows', rows)
            self.register_buffer('columns', columns)
            self.register_buffer('margin', margin)

    def forward(self, x: torch.Tensor) -> Any:
        """Map bytes (B, H, W, in_chans) to what the model gives."""
        x = x.to(self.scale.dtype)
        if self.resizes:
            W, in_chans = x.shape[2:]
            x = (self.rows @ x.flatten(2)).unflatten(2, (W, in_chans))  # B, h, W, in_chans
            x = (self.columns @ x).clamp(0., 255.) + self.margin  # B, h, w, in_chans
        return self.model((x * self.scale + self.offset).permute(0, 3, 1, 2))


def _require_onnx() -> Tuple[ModuleType, ModuleType]:
    require('onnxscript', 'onnx')
    return require('onnx', 'onnx'), require('onnxruntime', 'onnx')


def export_onnx(
        model: nn.Module,
        path: Union[str, Path],
        img_size: Optional[Union[int, Tuple[int, int]]] = None,
        dynamic_batch: bool = True,
        dynamic_size: bool = False,
        preprocess: bool = False,
        precision: str = 'float32',
        images: Optional[Union[str, Path]] = None,
        label_names: Optional[Sequence[str]] = None,
        opset: int = MIN_OPSET,
        resize_from: Optional[Tuple[int, int]] = None,
) -> Path:
    """Write a model to an ONNX file and see that ONNX Runtime agrees with PyTorch.

    The graph maps `image` to `logits`, or to `features_4`, `features_8` and so on (by their stride in pixels; by
    their place, from 0, where strides repeat) if the model was created with `features_only=True`. It holds operators
    of ONNX's own domain alone. The file's metadata says what the model is and how its images are prepared, and names
    its classes. The file appears at `path` only when it has passed the check, and is never seen half-written.

    Args:
        model: A model of this package or of timm, in float32; it is left as it was.
        path: File to write; its folder must exist. Weights of over 2 GB go to a second file, `path` + '.data'.
        img_size: Height and width in pixels, those of the model if None. With dynamic_size, the size to trace at.
        dynamic_batch: Let the batch size vary; otherwise it is 1.
        dynamic_size: Let height and width vary; the model must have been created with `dynamic_img_size=True`.
        preprocess: Take bytes (B, H, W, in_chans), RGB from 0 to 255, and normalise them in the graph; otherwise
            `image` is (B, in_chans, H, W), normalised as the model's data config says. Resizing is left to the caller
            unless `resize_from` is given.
        precision: 'float32'; 'float16' for weights and most operators, with inputs and outputs in float32; or 'int8'
            for the linear layers, by static quantisation, which `images` calibrate.
        images: Folder of images, at any depth, at most 128 of which the check and the calibration use.
        label_names: Name of each class; those of the model's pretrained_cfg, if it has any, if None.
        opset: Version of ONNX's operators, at least 20.
        resize_from: With preprocess, height and width of the pictures that the graph takes, as of a camera; it resizes
            and crops them as the model's data config says.

    Returns:
        The path.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        FileNotFoundError: The folder of `path`, or that of the images, does not exist.
        PermissionError: The folder of `path` cannot be written to.
        OSError: Writing fails, as on a full disk.
        ValueError: An argument is none of those above, or does not fit the model.
        RuntimeError: ONNX Runtime's outputs differ from PyTorch's by more than 1e-4 of their scale in float32, 2e-2
            in float16, or, in int8, by a fifth of their root mean square.
    """
    _require_onnx()
    path = Path(path)
    config = get_model_input_config(_inner(model))
    in_chans, *size = config['input_size']
    size = to_2tuple(img_size) if img_size is not None else tuple(size)
    data_config = resolve_model_data_config(_inner(model))
    label_names = _check_arguments(
        model, path, size, data_config, in_chans, dynamic_size, preprocess, precision, images, label_names, opset,
        resize_from)

    pictures = data_config if resize_from is None else {**data_config, 'crop_pct': 1., 'crop_mode': 'squash'}
    taken = resize_from or size
    real = _load_images(images, pictures, taken) if images is not None else []
    device = next(model.parameters()).device
    with _beside(path) as folder:
        with evaluating(model), torch.no_grad():
            wrapped, rewritten = model, rewrite_for_runtimes(model)
            if preprocess:
                wrapped, rewritten = (
                    _Preprocessed(m, data_config, size, resize_from).to(device).eval() for m in (wrapped, rewritten))
            graph = _trace(rewritten, model, in_chans, taken, device, dynamic_batch, dynamic_size, preprocess, opset)
            del rewritten
            batches = _make_batches(in_chans, taken, dynamic_batch, dynamic_size, real)
            if preprocess:
                batches = [_to_bytes(x, data_config) for x in batches]
            if precision == 'float16':
                graph = _to_float16(graph)
            elif precision == 'int8':
                calibration = [_to_bytes(x[None], data_config) if preprocess else x[None] for x in real]
                graph = _to_int8(graph, folder, calibration)
            _describe(graph, model, data_config, size, precision, label_names, resize_from)
            written = _save(graph, folder, path.name)
            _check_outputs(str(folder / path.name), wrapped, batches, precision, device)
        for file in written:  # the graph last: it names the other
            os.replace(file, path.parent / file.name)
    _logger.info('exported %s, %.1f MB', path, path.stat().st_size / 1e6)
    return path


def _inner(model: nn.Module) -> nn.Module:
    # timm's feature extractors keep the model that they wrap
    inner = getattr(model, 'model', None)
    return inner if isinstance(inner, nn.Module) and hasattr(inner, 'pretrained_cfg') else model


def _check_arguments(
        model, path, size, data_config, in_chans, dynamic_size, preprocess, precision, images, label_names, opset,
        resize_from,
) -> Optional[List[str]]:
    onnx, _ = _require_onnx()
    if not path.parent.is_dir():
        raise FileNotFoundError(f'path: got {str(path)!r}, its folder does not exist.')
    if path.is_dir():
        raise ValueError(f'path: got {str(path)!r}, a folder; must be a file, such as {str(path / "model.onnx")!r}.')
    if any(p.dtype != torch.float32 for p in model.parameters()):
        raise ValueError("model: got parameters that are not float32, must be model.float(); see precision='float16'.")
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f'img_size: got {size}, must be one or two positive numbers of pixels.')
    strict = _strict_size(model)
    if dynamic_size and strict is not None:
        raise ValueError('dynamic_size: the model takes one size; create it with dynamic_img_size=True.')
    if strict is not None and tuple(strict) != tuple(size):
        raise ValueError(f'img_size: got {size}, must be {tuple(strict)}: create the model with img_size={size}.')
    if precision not in PRECISIONS:
        raise ValueError(f'precision: got {precision!r}, must be one of {PRECISIONS}.')
    if precision == 'int8' and images is None:
        raise ValueError("images: got None, must be a folder of images to calibrate on for precision='int8'.")
    if not MIN_OPSET <= opset <= onnx.defs.onnx_opset_version():
        raise ValueError(f'opset: got {opset}, must be {MIN_OPSET} to {onnx.defs.onnx_opset_version()}.')
    if preprocess and len(data_config['mean']) != in_chans:
        raise ValueError(
            f'preprocess: the model takes {in_chans} channels but its config has a mean of {len(data_config["mean"])}.')
    if resize_from is not None:
        if not preprocess or dynamic_size:
            raise ValueError('resize_from: is for preprocess=True and a model of one size, without dynamic_size.')
        if len(resize_from) != 2 or min(resize_from) < 1:
            raise ValueError(f'resize_from: got {resize_from}, must be two positive numbers of pixels.')
    if images is not None and in_chans not in (1, 3):
        raise ValueError(f'images: the model takes {in_chans} channels, must be 1 or 3 to read image files.')
    num_classes = getattr(_inner(model), 'num_classes', None)
    if label_names is None:
        label_names = getattr(_inner(model), 'pretrained_cfg', {}).get('label_names')
        if label_names is not None and len(label_names) != num_classes:
            label_names = None  # another classifier has been put on
    elif len(label_names) != num_classes:
        raise ValueError(f'label_names: got {len(label_names)} names, must be {num_classes}, one for each class.')
    return None if label_names is None else [str(x) for x in label_names]


def _strict_size(model: nn.Module) -> Optional[Tuple[int, int]]:
    """The one size that a model takes, None if it takes any or does not say."""
    embed = getattr(_inner(model), 'patch_embed', None)
    return embed.img_size if getattr(embed, 'strict_img_size', False) else None


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    with ExitStack() as stack:
        try:
            folder = stack.enter_context(temporary_folder(path))
        except PermissionError as e:
            raise PermissionError(f'path: got {str(path)!r}, its folder cannot be written to ({e.strerror}).') from e
        yield folder


def _load_images(folder: Union[str, Path], data_config: Dict[str, Any], size: Tuple[int, int]) -> List[torch.Tensor]:
    if not Path(folder).is_dir():
        raise FileNotFoundError(f'images: got {str(folder)!r}, must be a folder of images.')
    mode = 'L' if data_config['input_size'][0] == 1 else 'RGB'
    try:
        files = find_images([str(folder)])
    except DataError as e:
        raise ValueError(f'images: got {str(folder)!r}, which holds no image files.') from e
    config = {**data_config, 'input_size': (data_config['input_size'][0], *size)}
    transform = create_transform(**config, is_training=False)
    step = max(1, -(-len(files) // _MAX_IMAGES))
    pictures = []
    for file in files[::step]:
        try:
            pictures.append(transform(read_image(file, mode)))
        except DataError as e:
            _logger.warning('%s', e)
    if not pictures:
        raise ValueError(f'images: got {str(folder)!r}, of whose images none can be read.')
    return pictures


def _random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _make_batches(
        in_chans: int,
        size: Tuple[int, int],
        dynamic_batch: bool,
        dynamic_size: bool,
        real: List[torch.Tensor],
) -> List[torch.Tensor]:
    """Batches of normalised images (B, in_chans, H, W) to check an export with: random ones, then `real` ones."""
    sizes = [size]
    if dynamic_size:  # rectangles, odd ones, smaller and larger
        H, W = size
        sizes += [(H, W + W // 2), (H - H // 4, W), (H + 1, W - 1), (H + H // 3, W - W // 5)]
    batches = [_random(3 if dynamic_batch else 1, in_chans, *s, seed=i) for i, s in enumerate(sizes)]
    if real:
        batches.append(torch.stack(real[:4 if dynamic_batch else 1]))
    return batches


def _to_bytes(images: torch.Tensor, data_config: Dict[str, Any]) -> torch.Tensor:
    images = denormalise(images, data_config['mean'], data_config['std'])
    return (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def _feature_strides(model: nn.Module) -> Optional[List[int]]:
    """Strides in pixels of the maps that timm's `features_only=True` gives, None for other models."""
    info = getattr(model, 'feature_info', None)
    return info.reduction() if isinstance(info, FeatureInfo) else None


def _output_names(model: nn.Module) -> List[str]:
    strides = _feature_strides(model)
    if strides is None:
        return ['logits']
    names = strides if len(set(strides)) == len(strides) else range(len(strides))
    return [f'features_{x}' for x in names]


def _trace(rewritten, model, in_chans, size, device, dynamic_batch, dynamic_size, preprocess, opset):
    # export specialises dimensions of size 1, so a dynamic batch is traced at 2
    example = _random(2 if dynamic_batch else 1, in_chans, *size)
    if preprocess:
        example = torch.zeros(len(example), *size, in_chans, dtype=torch.uint8)
    height = 1 if preprocess else 2
    dynamic: Dict[int, Any] = {0: torch.export.Dim('batch')} if dynamic_batch else {}
    if dynamic_size:
        dynamic.update({height: torch.export.Dim.DYNAMIC, height + 1: torch.export.Dim.DYNAMIC})
    shapes = logging.getLogger('torch.fx.experimental.symbolic_shapes')
    level = shapes.level
    shapes.setLevel(logging.ERROR)  # a traceback for every inequality between sizes that it cannot solve
    collecting = gc.isenabled()
    gc.disable()  # it takes a fifth of the time, for a graph all of which is in use
    try:
        program = torch.onnx.export(
            rewritten,
            (example.to(device),),
            input_names=['image'],
            output_names=_output_names(model),
            dynamic_shapes=(dynamic,) if dynamic else None,
            opset_version=opset,
            dynamo=True,
            optimize=False,
            verbose=False,
        )
        _simplify(program.model)
        _empty_caches(program)
    finally:
        shapes.setLevel(level)
        if collecting:
            gc.enable()
    if dynamic_size:
        names = {height: 'height', height + 1: 'width'}
        for dim, name in names.items():
            program.model.graph.inputs[0].shape[dim] = name
    return program.model


def _empty_caches(program) -> None:
    """Let go of what PyTorch has found for the sizes of an export, thousands of objects.

    Its caches of methods keep these sizes alive (torch 2.15), and nobody will ask for them again.
    """
    for node in program.exported_program.graph.nodes:
        sizes = getattr(getattr(node.meta.get('val'), 'fake_mode', None), 'shape_env', None)
        if sizes is not None:
            sizes.fake_tensor_cache.clear()


def _simplify(graph) -> None:
    """Compute in place what is constant, and remove what has no effect.

    What `torch.onnx.export(optimize=True)` does, less one rule of it (pairs of slices to splits), which compares all
    pairs of nodes: 5 of the 6 seconds of a large model at 448 pixels.
    """
    import onnx_ir.passes.common as passes
    from onnx_ir.passes import Sequential
    from onnxscript import optimizer, rewriter
    from onnxscript.rewriter.rules import common as rules
    optimizer.fold_constants(graph, onnx_shape_inference=True)
    rewriter.rewrite(graph, [
        rules.add_0_rule, rules.sub_0_rule, rules.mul_by_1_rule, rules.div_by_1_rule,
        rules.no_op_cast_rule, rules.cast_cast_rule, rules.no_op_expand_rule,
        rules.no_op_transpose_rule, rules.transpose_transpose_rule,
        rules.materialize_reshape_shape_rule, rules.reshape_reshape_rule, rules.squeeze_reshape_1d_rule,
        rules.unsqueeze_unsqueeze_rule, rules.collapse_slice_rule, rules.collapse_slice2_rule,
        rules.successive_relu_rule, rules.normalize_pad_format_conv_rule, rules.fuse_pad_into_conv_rule,
        rules.fuse_batchnorm_into_conv_rule, rules.remove_optional_bias_from_conv_rule,
    ])
    Sequential(
        passes.IdentityEliminationPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.RemoveUnusedNodesPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(graph)


def _to_float16(graph):
    import onnx_ir
    from onnxruntime.transformers.float16 import convert_float_to_float16
    return onnx_ir.from_proto(convert_float_to_float16(onnx_ir.to_proto(graph), keep_io_types=True))


def _to_int8(graph, folder: Path, calibration: Iterable[torch.Tensor]):
    import onnx
    import onnx_ir
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.images = iter(calibration)

        def get_next(self) -> Optional[Dict[str, Any]]:
            x = next(self.images, None)
            return None if x is None else {'image': x.numpy()}

    files = [str(folder / f'{name}.tmp.onnx') for name in ('float', 'prepared', 'int8')]
    onnx_ir.save(graph, files[0])
    quant_pre_process(files[0], files[1], skip_symbolic_shape=True)
    weights = {x.name: len(x.dims) for x in onnx.load(files[1]).graph.initializer}
    # linear layers: what multiplies attention weights is small and needs its digits
    linears = [n.name for n in onnx.load(files[1]).graph.node
               if n.op_type in ('MatMul', 'Gemm') and weights.get(n.input[1]) == 2]
    quantize_static(
        files[1],
        files[2],
        Reader(),
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=['MatMul', 'Gemm'],
        nodes_to_quantize=linears,
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        extra_options={'WeightSymmetric': True},
    )
    quantised = onnx_ir.from_proto(onnx.load(files[2]))
    for file in files:
        os.remove(file)
    return quantised


def _describe(graph, model, data_config, size, precision, label_names, resize_from) -> None:
    inner = _inner(model)
    # without where it was on this machine
    cfg = {k: v for k, v in getattr(inner, 'pretrained_cfg', {}).items() if v is not None and k not in _PLACE}
    description = dict(
        architecture=cfg.get('architecture', type(inner).__name__),
        precision=precision,
        img_size=json.dumps(size),
        data_config=json.dumps(data_config),
        pretrained_cfg=json.dumps(cfg, default=str),
    )
    if resize_from is not None:
        description['resize_from'] = json.dumps(resize_from)
    if label_names is not None:
        description['label_names'] = json.dumps(label_names)
    strides = _feature_strides(model)
    if strides is not None:
        description['feature_strides'] = json.dumps(strides)
    graph.metadata_props.clear()
    graph.metadata_props.update({k: str(v) for k, v in description.items()})
    graph.producer_name = 'elsa_models'


def _save(graph, folder: Path, name: str) -> List[Path]:
    """Write a graph, emptying it, to a folder; the files in the order in which they may appear elsewhere."""
    import onnx
    import onnx_ir
    weights = {name: value.const_value for name, value in graph.graph.initializers.items()}
    if sum(tensor.nbytes for tensor in weights.values()) > _MAX_PROTOBUF:
        onnx_ir.save(graph, folder / name, external_data=f'{name}.data')
        return [folder / f'{name}.data', folder / name]
    # Messages of protobuf, one after the other in a file, are read as one. Written tensor by tensor, 0.8 GB take
    # a quarter of the time that they take as one message, and no second copy in memory.
    graph.graph.initializers.clear()
    with open(folder / name, 'wb') as f:
        f.write(onnx_ir.to_proto(graph).SerializeToString())
        for key, tensor in weights.items():
            part = onnx.ModelProto()
            onnx_ir.serde.serialize_tensor_into(part.graph.initializer.add(), tensor)
            part.graph.initializer[0].name = key
            f.write(part.SerializeToString())
    return [folder / name]


def _check_outputs(path: str, model: nn.Module, batches: Iterable[torch.Tensor], precision: str, device) -> None:
    """Compare each batch, whole and its first image alone."""
    import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(path, options, providers=['CPUExecutionProvider'])
    for images in batches:
        expected = model(images.to(device))
        expected = [expected] if isinstance(expected, torch.Tensor) else expected
        for count in sorted({1, len(images)}):
            found = session.run(None, {'image': images[:count].numpy()})
            for output, e, f in zip(session.get_outputs(), expected, found, strict=True):
                _compare(output.name, e[:count].detach().cpu(), torch.from_numpy(f), precision, images[:count].shape)


def _compare(name: str, expected: torch.Tensor, found: torch.Tensor, precision: str, shape: torch.Size) -> None:
    if found.shape != expected.shape:
        raise RuntimeError(
            f'{name} of the exported graph has shape {tuple(found.shape)}, that of the model '
            f'{tuple(expected.shape)}, images {tuple(shape)}; nothing was written.')
    if precision == 'int8':
        error, scale = (x.square().mean().sqrt().item() for x in (found - expected, expected))
        tolerance = _TOLERANCE_INT8
    else:
        error, scale = (x.abs().max().item() for x in (found - expected, expected))
        tolerance = _TOLERANCE[precision]
    if not error <= tolerance * scale:
        raise RuntimeError(
            f'exported graph differs from the model in {name} by {error:.2e}, more than {tolerance:.0e} '
            f'of their scale, {scale:.2e}; images {tuple(shape)}; nothing was written.')
