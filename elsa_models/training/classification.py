"""Classifiers: data, loss and evaluation of image classification."""
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.data import Mixup, resolve_input_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from timm.data.random_erasing import RandomErasing
from timm.loss.class_weights import compute_class_weights
from timm.task import ClassificationTask
from timm.task.task import TrainingTask
from timm.utils import ModelEmaV3, unwrap_model
from torch.utils.data import Dataset

from ..export import export_onnx
from ..layers import ElsaAttention
from ..models import TokenLabelModel, token_label_loss
from ..models._checkpoint import WeightsError, read_checkpoint, unwrap
from ..models._saving import save_folder
from ..models._warm_start import warm_start
from ..models.elsa_swin import is_authors
from .config import ImageValues, Recipe, RecipeError, weights_error
from .data import LabelledImages, Splits, create_eval_transform, create_train_transform, load_splits
from .job import Job
from .loading import DataError, EvalLoader, TrainLoader
from .world import World

_logger = logging.getLogger(__name__)

MODEL, ONNX, CURVES, CONFUSION, PREDICTIONS, ATTENTION = (
    'model', 'model.onnx', 'curves.png', 'confusion.png', 'predictions.png', 'attention.png')


class Predictions(NamedTuple):
    """What a model says of N images, in the order of the data set; those that cannot be read are left out."""
    targets: torch.Tensor  # N, classes
    predicted: torch.Tensor  # N, classes
    confidence: torch.Tensor  # N, probability of the predicted class
    loss: torch.Tensor  # N, cross-entropy, float64
    in_top5: torch.Tensor  # N, bool
    index: torch.Tensor  # N, number of the image

    def metrics(self) -> Dict[str, float]:
        """Loss, top-1 and top-5 accuracy in percent, and the number of images; independent of any order."""
        number = len(self.targets)
        return dict(
            loss=math.fsum(self.loss.tolist()) / number,  # exact, so that batches and processes do not show
            top1=100. * (self.predicted == self.targets).sum().item() / number,
            top5=100. * self.in_top5.sum().item() / number,
            images=number,
        )


def on_device(loader: Any, data_config: Dict[str, Any], device: torch.device) -> PrefetchLoader:
    """Batches of bytes, moved to the device ahead of time and normalised there."""
    return PrefetchLoader(
        loader,
        mean=data_config['mean'],
        std=data_config['std'],
        channels=data_config['input_size'][0],
        device=device,
    )


def create_eval_loader(
        dataset: Dataset,
        batch_size: int,
        world: World,
        data_config: Dict[str, Any],
        workers: int = 0,
) -> EvalLoader:
    """A loader for `predict`.

    Args:
        dataset: Images as bytes (C, H, W), and classes.
        batch_size: Images of a batch.
        world: This process.
        data_config: Size, mean and std, as `timm.data.resolve_data_config` returns them.
        workers: Processes that load.
    """
    return EvalLoader(
        dataset,
        batch_size,
        world,
        missing=(torch.zeros(data_config['input_size'], dtype=torch.uint8), -1),
        workers=workers,
        collate=fast_collate,
        wrap=partial(on_device, data_config=data_config, device=world.device),
    )


def predict(model: Any, loader: EvalLoader, world: World) -> Predictions:
    """Classify all images of a loader; all processes take part and get the same.

    Args:
        model: Maps images (B, C, H, W) to logits (B, classes).
        loader: Batches of images and classes; class -1 for images that are to be left out.
        world: This process.

    Raises:
        DataError: There are no images.
    """
    columns: List[List[torch.Tensor]] = [[], [], [], [], []]
    for images, targets in loader:
        logits = model(images).double()
        probabilities = logits.softmax(dim=-1)
        confidence, predicted = probabilities.max(dim=-1)
        top5 = logits.topk(min(5, logits.shape[-1]), dim=-1).indices
        loss = nn.functional.cross_entropy(logits, targets.clamp(min=0), reduction='none')
        in_top5 = (top5 == targets[:, None]).any(dim=-1)
        for column, x in zip(columns, (targets, predicted, confidence, loss, in_top5)):
            column.append(x.cpu())
    mine = [torch.cat(column)[:loader.num_valid] for column in columns] if columns[0] else None
    parts = [part for part in world.gather(mine) if part is not None]
    if not parts:
        raise DataError('there are no images to evaluate on.')
    merged = [loader.merge([part[i] for part in parts]) for i in range(len(columns))]
    index = (merged[0] >= 0).nonzero().flatten()
    if not len(index):
        raise DataError('none of the images to evaluate on can be read.')
    return Predictions(*(x[index] for x in merged), index)


class _TokenLabelForward(nn.Module):
    """A model whose forward is `forward_train`, so that DDP sees it; timm unwraps `module`."""

    def __init__(self, model: TokenLabelModel) -> None:
        super().__init__()
        self.module = model

    def forward(self, x: torch.Tensor) -> Any:
        return self.module.forward_train(x)


class TokenLabelTask(ClassificationTask):
    """Token labelling (`All Tokens Matter` - https://arxiv.org/abs/2104.10858), with MixToken.

    Targets are classes, or pairs of classes and label maps (B, h, w, classes).
    """

    def __init__(self, model: TokenLabelModel, dense_weight: float, smoothing: float, device: torch.device) -> None:
        """
        Args:
            model: Has an aux head; `use_mix_token` makes it mix.
            dense_weight: Weight of the tokens' loss.
            smoothing: Label smoothing of both losses.
            device: Device of the model.
        """
        super().__init__(_TokenLabelForward(model), criterion=nn.Identity(), device=device, verbose=False)
        self.dense_weight = dense_weight
        self.smoothing = smoothing

    def setup_ema(self, **kwargs) -> nn.Module:
        """Keep a moving average of the model itself."""
        self.trainable_module_ema = ModelEmaV3(unwrap_model(self.trainable_module), **kwargs)
        return self.trainable_module_ema

    def compile(self, **kwargs) -> nn.Module:
        """Compile training and evaluation."""
        model = unwrap_model(self.trainable_module)
        self.trainable_module = torch.compile(self.trainable_module, **kwargs)
        self.eval_model = torch.compile(model, **kwargs)
        return self.eval_model

    def get_eval_model(self, module: Optional[nn.Module] = None, ema: bool = False) -> Optional[nn.Module]:
        """The model with its own forward."""
        if not ema and module is None and not hasattr(self, 'eval_model'):
            return unwrap_model(self.trainable_module)
        return super().get_eval_model(module, ema=ema)

    def forward(self, input: torch.Tensor, target: Any) -> Dict[str, torch.Tensor]:
        """Loss of a batch: class token and tokens."""
        target, dense = target if isinstance(target, (tuple, list)) else (target, None)
        output = self.trainable_module(input)
        loss = token_label_loss(
            output, target, dense, dense_weight=self.dense_weight, label_smoothing=self.smoothing)
        return dict(loss=loss, output=output.logits)


class ClassificationJob(Job):
    """Trains a classifier as a `Recipe` says."""
    metric = 'top1'
    outputs = (MODEL, ONNX, CURVES, CONFUSION, PREDICTIONS, ATTENTION)

    @classmethod
    def requirements(cls, recipe: Recipe) -> List[Tuple[str, str]]:
        """Packages beyond the core that a recipe needs."""
        names = [('matplotlib', 'train')] if recipe.figures else []
        names += [(name, 'onnx') for name in ('onnx', 'onnxruntime', 'onnxscript')] if recipe.onnx else []
        names += [('datasets', 'data')] if recipe.data.lower().startswith(('hfds/', 'hfids/')) else []
        names += [('webdataset', 'data')] if recipe.data.lower().startswith('wds/') else []
        return names

    def __init__(self, recipe: Recipe, world: World) -> None:
        """
        Raises:
            RecipeError: A value of the recipe cannot be used.
            DataError: The data cannot be used.
        """
        self.recipe, self.world = recipe, world
        self.splits: Splits = load_splits(recipe, batch_size=recipe.batch_size, seed=recipe.seed)
        num_classes = len(self.splits.class_names)
        model = create_model(recipe, num_classes).to(world.device)
        self.data_config = resolve_images(recipe, model)
        self.splits.set_mode(color_mode(self.data_config))
        train, collate = self._train_images()
        self.splits.val.transform = create_eval_transform(self.data_config)
        self.train_loader = TrainLoader(
            train,
            recipe.batch_size,
            world,
            recipe.seed,
            accumulate=recipe.accumulate,
            workers=recipe.workers,
            collate=collate,
            wrap=partial(on_device, data_config=self.data_config, device=world.device),
        )
        self._eval_loader = self._create_eval_loader(world)
        self.task = self._create_task(model)
        self._erase = None
        if recipe.re_prob:
            self._erase = RandomErasing(
                recipe.re_prob, mode=recipe.re_mode, max_count=recipe.re_count, device=str(world.device))
        self.num_parameters = sum(p.numel() for p in model.parameters())
        if world.is_main:
            _logger.info(
                '%s: %d images of %d classes to train on, %d held out', recipe.data, self.train_loader.num_images,
                num_classes, len(self.splits.val))
            _logger.info(
                '%s: %.2f M parameters, images of %d x %d pixels, on %s%s', recipe.model, self.num_parameters / 1e6,
                *self.data_config['input_size'][1:], world.device,
                f' and {world.size - 1} more' if world.size > 1 else '')

    def _train_images(self) -> Tuple[Dataset, Callable]:
        """The images to train on, transformed, and what makes batches of them."""
        recipe, images = self.recipe, self.splits.train
        if recipe.token_labels in (None, 'image'):
            images.transform = create_train_transform(recipe, self.data_config)
            return images, fast_collate
        from . import token_labels
        if not isinstance(images, LabelledImages):
            raise RecipeError("token_labels: label maps are for images in folders; must be 'image' or none.")
        if recipe.train_crop_mode != 'rrc':
            raise RecipeError('train_crop_mode: must be rrc with label maps, which are cropped alike.')
        maps = token_labels.LabelMaps(recipe.token_labels)
        if maps.num_classes != len(self.splits.class_names):
            raise RecipeError(
                f'token_labels: the maps are of {maps.num_classes} classes, the data has'
                f' {len(self.splits.class_names)}.')
        transforms = create_train_transform(recipe, self.data_config, separate=True)
        return token_labels.TokenLabelledImages(
            images, maps, transforms, recipe.hflip, recipe.vflip), token_labels.collate

    def _create_eval_loader(self, world: World) -> EvalLoader:
        """The held-out images, shared among the processes of `world`."""
        recipe = self.recipe
        return create_eval_loader(self.splits.val, recipe.eval_batch_size, world, self.data_config, recipe.workers)

    def _create_task(self, model: nn.Module) -> TrainingTask:
        recipe, device = self.recipe, self.world.device
        num_classes = len(self.splits.class_names)
        self._mixup = None
        if recipe.mixup or recipe.cutmix:
            if self.train_loader.batch_size // (self.world.size * recipe.accumulate) % 2:
                raise RecipeError('batch_size: must be even in each process and part for mixup and cutmix.')
            if recipe.token_labels:
                raise RecipeError('mixup, cutmix: must be 0 with token_labels, which mix by themselves (MixToken).')
            self._mixup = Mixup(
                mixup_alpha=recipe.mixup,
                cutmix_alpha=recipe.cutmix,
                prob=recipe.mixup_prob,
                switch_prob=recipe.mixup_switch_prob,
                mode=recipe.mixup_mode,
                label_smoothing=recipe.smoothing,
                num_classes=num_classes,
            )
        if recipe.token_labels:
            if not isinstance(model, TokenLabelModel) or not model.use_aux_head:
                raise RecipeError(f'token_labels: {recipe.model!r} has no aux head.')
            return TokenLabelTask(model, recipe.token_weight, recipe.smoothing, device)
        smoothing = 0. if self._mixup is not None else recipe.smoothing  # mixed targets are smooth already
        weight = None
        if recipe.class_balance:
            counts = self.splits.class_counts()
            _, weight = compute_class_weights(counts, int(counts.sum()), method=recipe.class_balance)
        try:
            if recipe.loss == 'ce' and weight is not None:
                return ClassificationTask(
                    model, nn.CrossEntropyLoss(weight, label_smoothing=smoothing), device=device, verbose=False)
            criterion = dict(
                loss_type=recipe.loss, smoothing=smoothing, soft_targets=self._mixup is not None, class_weight=weight)
            return ClassificationTask(model, criterion_kwargs=criterion, device=device, verbose=False)
        except ValueError as e:
            raise RecipeError(f'loss: {recipe.loss!r} is not possible with mixup, cutmix or class_balance. {e}') from e

    def prepare(self, batch: Any, epoch: int) -> Tuple[Any, ...]:
        """Images, erased and mixed, and targets."""
        images, targets = batch
        if self._erase is not None:
            images = self._erase(images)
        if self._mixup is not None:
            last = self.recipe.epochs + self.recipe.cooldown_epochs - self.recipe.mixup_off_epochs
            self._mixup.mixup_enabled = epoch < last
            images, targets = self._mixup(images, targets)
        if self.recipe.token_labels not in (None, 'image'):
            grid = self.model.patch_embed.grid_size
            scale = self.model.pooling_scale
            size = tuple(math.ceil(side / scale) for side in grid)
            targets = targets.classes, targets.dense(size, len(self.splits.class_names))
        if self.recipe.channels_last:
            images = images.contiguous(memory_format=torch.channels_last)
        return images, targets

    def preview(self, args: Tuple[Any, ...]) -> torch.Tensor:
        """The images as the model is given them."""
        images = args[0]
        mean, std = (torch.tensor(self.data_config[k], device=images.device).view(1, -1, 1, 1) for k in ('mean', 'std'))
        return (images * std + mean).clamp(0., 1.)

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        """Loss, top-1 and top-5 accuracy of the held-out images."""
        metrics = predict(model, self._eval_loader, self.world).metrics()
        if self.world.is_main and metrics['images'] < len(self.splits.val):
            _logger.warning('%d held-out images do not count', len(self.splits.val) - metrics['images'])
        return metrics

    def _load(self, index: int) -> torch.Tensor:
        """A held-out image as the model takes it: (C, H, W)."""
        mean, std = (torch.tensor(self.data_config[k]).view(-1, 1, 1) for k in ('mean', 'std'))
        return (torch.as_tensor(self.splits.val[index][0]) / 255. - mean) / std

    def whole_model(self) -> nn.Module:
        """A model as that of the recipe, without weights."""
        recipe = self.recipe
        return timm.create_model(
            recipe.model, num_classes=len(self.splits.class_names), **recipe.model_args).to(self.world.device)

    def finish(self, model: nn.Module, folder: Path, history: List[Dict[str, float]]) -> None:
        """Save the model, export it, draw what it has learned."""
        class_names = self.splits.class_names
        save_model(model, folder / MODEL, class_names, self.data_config, keeps_licence(self.recipe))
        _logger.info('saved the model; loaded it again, logits are equal')
        if self.recipe.onnx:
            export_onnx(model, folder / ONNX)
            _logger.info('exported the model to ONNX; ONNX Runtime agrees with it')
        if self.recipe.figures:
            from . import figures
            figures.draw_curves(history, folder / CURVES)
            if self.splits.is_stream and self.world.size > 1:
                _logger.info('%s: not drawn, this process reads only its share of the stream', CONFUSION)
                return
            alone = World(self.world.device)
            with torch.no_grad():
                predictions = predict(model, self._create_eval_loader(alone), alone)
            figures.draw_confusion(predictions.targets, predictions.predicted, class_names, folder / CONFUSION)
            if not self.splits.is_stream:
                figures.draw_predictions(self.splits.val, predictions, class_names, folder / PREDICTIONS)
                if any(isinstance(m, ElsaAttention) for m in model.modules()):
                    figures.draw_attention(model, self._load, predictions, class_names, folder / ATTENTION)


def create_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The model of a recipe, with its first weights.

    Args:
        recipe: Says which.
        num_classes: Outputs of the classifier.

    Raises:
        RecipeError: timm does not know the model, it does not take `model_args`, or its weights are not there.
    """
    derived = {'num_classes', 'pretrained', 'checkpoint_path', 'features_only'} & recipe.model_args.keys()
    if derived:
        raise RecipeError(f'model_args: {min(derived)!r} is not to be given; it follows from the data and the recipe.')
    overlay: Optional[Dict[str, Any]] = None
    if recipe.checkpoint is not None:
        if not Path(recipe.checkpoint).is_file():
            raise RecipeError(f'checkpoint: got {recipe.checkpoint!r}, no such file.')
        overlay = dict(file=recipe.checkpoint)
    try:
        model = timm.create_model(
            recipe.model,
            pretrained=recipe.pretrained or overlay is not None,
            pretrained_cfg_overlay=overlay,
            num_classes=num_classes,
            **recipe.model_args,
        )
    except WeightsError as e:
        raise weights_error(e, recipe.pretrained, recipe.checkpoint) from e
    except (TypeError, ValueError, RuntimeError, FileNotFoundError) as e:
        raise RecipeError(f'model: {recipe.model!r} with model_args {recipe.model_args} is not possible. {e}') from e
    if recipe.warm_start is not None:
        try:
            _logger.info('%s', warm_start(model, recipe.warm_start))
        except (TypeError, ValueError, RuntimeError, FileNotFoundError) as e:
            raise RecipeError(f'warm_start: {recipe.warm_start!r} is not possible. {e}') from e
    return model


def keeps_licence(recipe: Recipe) -> bool:
    """Whether a run starts from the weights that the model's cfg describes: its own, or the authors' file."""
    if recipe.checkpoint is not None:
        return is_authors(unwrap(read_checkpoint(recipe.checkpoint)))
    return recipe.pretrained


def save_model(
        model: nn.Module,
        folder: Union[str, Path],
        class_names: List[str],
        data_config: Dict[str, Any],
        keep_licence: bool = False,
) -> None:
    """Save weights as safetensors beside timm's config.json, and see that they load to an equal model.

    Args:
        model: Model in evaluation mode.
        folder: Folder to create.
        class_names: Name of each output.
        data_config: Preprocessing, as `timm.data.resolve_data_config` returns it.
        keep_licence: Whether the weights come from those of the model's cfg, whose licence is theirs then.

    Raises:
        RuntimeError: The model that was loaded again computes other logits.
    """
    origin = dict(tag=None, origin_url=None)  # these weights are the user's
    if not keep_licence:
        origin['license'] = None
    save_folder(model, folder, dict(label_names=list(class_names), pretrained_cfg=origin), data_config)
    device = next(model.parameters()).device
    loaded = timm.create_model(f'local-dir:{folder}', pretrained=True).to(device).eval()
    images = torch.randn(2, *data_config['input_size'], generator=torch.Generator().manual_seed(0)).to(device)
    with torch.inference_mode():
        if not torch.equal(loaded(images), model(images)):
            raise RuntimeError(f'{folder}: the saved model, loaded again, differs from the trained one.')


def resolve_images(values: ImageValues, model: nn.Module) -> Dict[str, Any]:
    """How a model is given images, as `timm.data.resolve_data_config` returns it.

    Raises:
        RecipeError: A value does not fit the model.
    """
    names = ('crop_pct', 'interpolation', 'mean', 'std')
    try:
        return resolve_input_data_config(model, args={name: getattr(values, name) for name in names})
    except ValueError as e:
        raise RecipeError(str(e)) from e


def color_mode(data_config: Dict[str, Any]) -> str:
    """Pillow's mode of the images that a model takes.

    Raises:
        RecipeError: They are neither grey nor of three colours.
    """
    channels = data_config['input_size'][0]
    if channels not in (1, 3):
        raise RecipeError(f'model_args: got {channels} input channels, must be 1 (grey) or 3.')
    return 'L' if channels == 1 else 'RGB'
