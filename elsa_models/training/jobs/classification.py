"""Classifiers: data, loss and evaluation of image classification."""
import json
import logging
import math
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, Tuple, Union

import timm
import torch
import torch.nn as nn
from timm.data import Mixup
from timm.data.loader import fast_collate
from timm.data.random_erasing import RandomErasing
from timm.loss.class_weights import compute_class_weights
from timm.task import ClassificationTask
from timm.task.task import TrainingTask
from torch.utils.data import Dataset

from ..._files import write_atomically
from ..._images import denormalise, draw, normalise
from ...export import export_onnx
from ...hub.cache import sha256_of
from ...hub.card import UNKNOWN, model_card
from ...inference import figures
from ...inference.classifier import color_mode, create_eval_transform, normalised, resolve_images
from ...inspect import has_local_attention
from ...models import TokenLabelModel, families
from ...models._checkpoint import WeightsError, read_checkpoint, unwrap
from ...models._naming import ModelError, create_named, find_model
from ...models._saving import save_folder
from ...models._warm_start import warm_start
from ..config import Recipe, RecipeError, weights_error
from ..data import LabelledImages, Splits, create_train_transform, load_splits
from ..evaluation import create_eval_loader, predict, reestimate
from ..job import Job
from ..loading import EvalLoader, TrainLoader
from ..token_labels import TokenLabelledImages, TokenLabelTask, TokenMaps, collate
from ..world import World

_logger = logging.getLogger(__name__)

MODEL, ONNX, LABELS, CURVES, CONFUSION, CLASSES, PREDICTIONS, ATTENTION = (
    'model', 'model.onnx', 'labels.json', 'curves.png', 'confusion.png', 'classes.csv', 'predictions.png',
    'attention.png')
RANDOM_WEIGHTS = 'random weights'


class ClassificationJob(Job):
    """Trains a classifier as a `Recipe` says.

    Attributes:
        first_weights: What the training starts from, in words; `RANDOM_WEIGHTS` for those.
    """
    metric = 'top1'
    in_percent = ('top',)
    recipe_kind = Recipe
    outputs = (MODEL, ONNX, LABELS, CURVES, CONFUSION, CLASSES, PREDICTIONS, ATTENTION)

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
        self.first_weights = _first_weights(recipe)
        try:
            self.data_config = resolve_images(model, **recipe.preparation())
            self.splits.set_mode(color_mode(self.data_config))
        except ModelError as e:
            raise RecipeError(str(e)) from e
        if recipe.reestimate:
            reestimate(
                model, self.splits.train, recipe.reestimate, recipe.eval_batch_size, world, self.data_config,
                recipe.workers, report=False)
        train, collate_train = self._train_images()
        self.splits.val.transform = create_eval_transform(self.data_config)
        self.train_loader = TrainLoader(
            train,
            recipe.batch_size,
            world,
            recipe.seed,
            accumulate=recipe.accumulate,
            workers=recipe.workers,
            collate=collate_train,
            wrap=partial(normalised, data_config=self.data_config, device=world.device),
            min_steps=recipe.steps_per_epoch,
        )
        self._eval_loader = self._create_eval_loader(world)
        self._missing = 0  # held-out images, when last evaluated
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
        if not isinstance(images, LabelledImages):
            raise RecipeError("token_labels: label maps are for images in folders; must be 'image' or none.")
        if recipe.train_crop_mode != 'rrc':
            raise RecipeError('train_crop_mode: must be rrc with label maps, which are cropped alike.')
        maps = TokenMaps(recipe.token_labels)
        if maps.num_classes != len(self.splits.class_names):
            raise RecipeError(
                f'token_labels: the maps are of {maps.num_classes} classes, the data has'
                f' {len(self.splits.class_names)}.')
        transforms = create_train_transform(recipe, self.data_config, separate=True)
        return TokenLabelledImages(
            images, maps, transforms, recipe.hflip, recipe.vflip), collate

    def _create_eval_loader(self, world: World, report: bool = True) -> EvalLoader:
        """The held-out images, shared among the processes of `world`."""
        recipe = self.recipe
        return create_eval_loader(
            self.splits.val, recipe.eval_batch_size, world, self.data_config, recipe.workers, report)

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
        return denormalise(args[0], self.data_config['mean'], self.data_config['std'])

    def evaluate(self, model: nn.Module) -> Dict[str, float]:
        """Loss, top-1 and top-5 accuracy of the held-out images."""
        metrics = predict(model, self._eval_loader, self.world).metrics()
        missing = len(self.splits.val) - metrics['images']
        if self.world.is_main and missing > self._missing:
            _logger.warning('held-out images that cannot be read, and do not count: %d', missing)
        self._missing = missing
        return metrics

    def _load(self, index: int) -> torch.Tensor:
        """A held-out image as the model takes it: (C, H, W)."""
        return normalise(torch.as_tensor(self.splits.val[index][0]), self.data_config['mean'], self.data_config['std'])

    def whole_model(self) -> nn.Module:
        """A model as that of the recipe, without weights."""
        recipe = self.recipe
        source = find_model(recipe.model)
        arguments = {**source.model_args, **recipe.model_args}
        return timm.create_model(
            source.name, num_classes=len(self.splits.class_names), **arguments).to(self.world.device)

    def finish(self, model: nn.Module, folder: Path, history: List[Dict[str, float]]) -> None:
        """Save the model, export it, draw what it has learned."""
        class_names = self.splits.class_names
        saved = save_model(model, folder / MODEL, class_names, self.data_config, keeps_licence(self.recipe))
        _logger.info('saved the model; loaded it again, logits are equal')
        write_atomically(self._card(model, folder / MODEL, history), folder / MODEL / 'README.md')
        write_atomically(json.dumps(list(class_names), ensure_ascii=False), folder / LABELS)  # for docs/web/index.html
        if self.recipe.onnx:
            export_onnx(saved, folder / ONNX)  # which knows classes and preparation
            _logger.info('exported the model to ONNX; ONNX Runtime agrees with it')
        if not self.recipe.figures:
            return
        draw('curves', figures.draw_curves, history, folder / CURVES)
        if self.splits.is_stream and self.world.size > 1:
            _logger.info('%s: not drawn, this process reads only its share of the stream', CONFUSION)
            return
        alone = World(self.world.device)
        with torch.no_grad():
            found = predict(model, self._create_eval_loader(alone, report=False), alone)  # evaluation has reported
        pair = (found.targets, found.predicted, class_names)
        figures.write_classes(*pair, folder / CLASSES)
        draw('confusion', figures.draw_confusion, *pair, folder / CONFUSION)
        if not self.splits.is_stream:
            draw('predictions', figures.draw_predictions, self.splits.val, found, class_names, folder / PREDICTIONS)
            if has_local_attention(model):
                draw('attention', figures.draw_attention, model, self._load, self.data_config, found, class_names,
                     folder / ATTENTION)

    def _card(self, model: nn.Module, folder: Path, history: List[Dict[str, float]]) -> str:
        """The model card, with the accuracy of the best epoch."""
        recipe, key = self.recipe, f'val_{self.metric}'
        best = max(reversed(history), key=lambda row: row[key])  # the last of equals, as in training
        config = json.loads((folder / 'config.json').read_text(encoding='utf-8'))
        return model_card(
            model,
            recipe.run_name,
            f'Trained with elsa_models on {self.train_loader.num_images} images, from {self.first_weights}.',
            config['pretrained_cfg'].get('license') or UNKNOWN,
            sha256_of(folder / 'model.safetensors'),
            source=f'epochs | {best["epoch"]:.0f} of {len(history)}, the best on the held-out images',
            accuracy=f'Accuracy on {best["val_images"]:.0f} held-out images, by which the epoch was chosen:'
                     f' {best[key]:.2f} % top-1.',
            data_config=self.data_config,
        )


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
    try:
        model = create_named(
            recipe.model, recipe.pretrained, recipe.checkpoint, num_classes=num_classes, **recipe.model_args)
    except ModelError as e:
        raise RecipeError(str(e)) from e
    except WeightsError as e:
        raise weights_error(e, recipe.pretrained, recipe.checkpoint) from e
    if recipe.warm_start is not None:
        try:
            _logger.info('%s', warm_start(model, recipe.warm_start))
        except (TypeError, ValueError, RuntimeError, FileNotFoundError) as e:
            raise RecipeError(f'warm_start: {recipe.warm_start!r} is not possible. {e}') from e
    return model


def _first_weights(recipe: Recipe) -> str:
    if recipe.pretrained or recipe.checkpoint is not None or find_model(recipe.model).path is not None:
        return 'trained weights'
    return RANDOM_WEIGHTS if recipe.warm_start is None else 'the weights of a related model'


def keeps_licence(recipe: Recipe) -> bool:
    """Whether a run starts from the weights that the model's cfg describes: its own, or the authors' file."""
    if recipe.checkpoint is not None:
        weights = unwrap(read_checkpoint(recipe.checkpoint))
        return any(family.is_authors(weights) for family in families())
    return recipe.pretrained


def save_model(
        model: nn.Module,
        folder: Union[str, Path],
        class_names: List[str],
        data_config: Dict[str, Any],
        keep_licence: bool = False,
) -> nn.Module:
    """Save weights as safetensors beside timm's config.json, and see that they load to an equal model.

    Args:
        model: Model in evaluation mode.
        folder: Folder to create.
        class_names: Name of each output.
        data_config: Preprocessing, as `timm.data.resolve_data_config` returns it.
        keep_licence: Whether the weights come from those of the model's cfg, whose licence is theirs then.

    Returns:
        The model that was loaded again, in evaluation mode.

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
    return loaded
