"""The training loop: timm's task, optimiser, schedule and evaluator, epoch by epoch."""
import csv
import math
from pathlib import Path
from typing import Any, Dict, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.task import ClassificationTask
from timm.task.task import TrainingTask
from timm.utils import dispatch_clip_grad
from torch.utils.data import DataLoader

from .._extras import require
from .config import Recipe, RecipeError


def create_optimizer(
        recipe: Recipe,
        model: nn.Module,
        steps_per_epoch: int,
) -> Tuple[torch.optim.Optimizer, Optional[Scheduler]]:
    """The optimiser and its schedule, which counts steps; None for no schedule.

    Args:
        recipe: Says which.
        model: Model to be trained.
        steps_per_epoch: Batches in an epoch.

    Raises:
        RecipeError: timm does not know the optimiser, or it does not take `opt_args`.
    """
    try:
        optimizer = create_optimizer_v2(
            model,
            opt=recipe.opt,
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            layer_decay=recipe.layer_decay,
            **recipe.opt_args,
        )
    except (TypeError, ValueError) as e:
        raise RecipeError(f'opt: {recipe.opt!r} with opt_args {recipe.opt_args} is not possible. {e}') from e
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched=recipe.sched,
        num_epochs=recipe.epochs,
        warmup_epochs=min(recipe.warmup_epochs, recipe.epochs / 2),
        warmup_lr=recipe.warmup_lr,
        min_lr=recipe.min_lr,
        step_on_epochs=False,
        updates_per_epoch=steps_per_epoch,
    )
    return optimizer, scheduler


def train_epoch(
        task: TrainingTask,
        loader: DataLoader,
        optimizer: torch.optim.Optimizer,
        scheduler: Optional[Scheduler],
        epoch: int,
        clip_grad: Optional[float] = None,
        progress: Any = None,
) -> float:
    """Train for one epoch.

    Args:
        task: Computes the loss.
        loader: Batches of images and targets.
        optimizer: Takes a step for each batch.
        scheduler: Sets the learning rate of each step, or None.
        epoch: Number of this epoch, from 0.
        clip_grad: Largest norm of the gradient, or None.
        progress: Bar to advance by one for each batch, or None.

    Returns:
        Mean loss.

    Raises:
        RuntimeError: The loss is not finite.
    """
    task.train()
    total = torch.zeros((), device=task.device)
    for step, (images, targets) in enumerate(loader):
        images = images.to(task.device, non_blocking=True)
        targets = targets.to(task.device, non_blocking=True)
        loss = task(images, targets)['loss']
        optimizer.zero_grad()
        loss.backward()
        if clip_grad:
            dispatch_clip_grad(task.get_clip_parameters(), clip_grad)
        optimizer.step()
        if scheduler is not None:
            scheduler.step_update(epoch * len(loader) + step + 1)
        total += loss.detach()
        if progress is not None:
            progress.update()
    mean = total.item() / len(loader)
    if not math.isfinite(mean):
        raise RuntimeError(f'the loss of epoch {epoch + 1} is {mean}; a lower lr, or clip_grad, may help.')
    return mean


@torch.inference_mode()
def predict(task: TrainingTask, loader: DataLoader) -> Tuple[torch.Tensor, torch.Tensor]:
    """Logits (N, classes) and targets (N,) of all images of a loader, in its order, on the CPU."""
    task.eval()
    model = task.get_eval_model()
    logits, targets = [], []
    for images, target in loader:
        logits.append(model(images.to(task.device, non_blocking=True)).float().cpu())
        targets.append(target)
    return torch.cat(logits), torch.cat(targets)


def evaluate(task: TrainingTask, loader: DataLoader) -> Dict[str, float]:
    """Loss, top-1 and top-5 accuracy in percent, of all images of a loader."""
    evaluator = task.create_evaluator()
    evaluator.device = torch.device('cpu')
    evaluator.reset()
    evaluator.update(*predict(task, loader))
    return evaluator.compute()


def fit(
        recipe: Recipe,
        model: nn.Module,
        train_loader: DataLoader,
        val_loader: DataLoader,
        device: torch.device,
        log_file: Union[str, Path],
) -> Tuple[TrainingTask, Dict[str, float]]:
    """Train a model and evaluate it after each epoch.

    Args:
        recipe: Says how.
        model: Model on `device`; trained in place.
        train_loader: Batches to train on.
        val_loader: Batches to evaluate on.
        device: Where to train.
        log_file: CSV to write, one row for each epoch: its number, the mean training loss, the learning
            rate it began with, and the accuracy on `val_loader` in percent.

    Returns:
        The task around the trained model, and the metrics of the last epoch as `evaluate` returns them.

    Raises:
        RuntimeError: The loss is not finite.
    """
    tqdm = require('tqdm').tqdm
    task = ClassificationTask(
        model,
        criterion_kwargs=dict(loss_type=recipe.loss, smoothing=recipe.smoothing),
        device=device,
        verbose=False,
    )
    optimizer, scheduler = create_optimizer(recipe, model, len(train_loader))
    metrics = {}
    with open(log_file, 'w', newline='', encoding='utf-8') as file:
        writer = csv.writer(file)
        writer.writerow(['epoch', 'loss', 'lr', 'accuracy'])
        for epoch in range(recipe.epochs):
            title = f'epoch {epoch + 1:{len(str(recipe.epochs))}}/{recipe.epochs}'
            with tqdm(total=len(train_loader), desc=title, unit='batch', dynamic_ncols=True) as progress:
                lr = max(group['lr'] for group in optimizer.param_groups)
                loss = train_epoch(task, train_loader, optimizer, scheduler, epoch, recipe.clip_grad, progress)
                metrics = evaluate(task, val_loader)
                progress.set_postfix_str(f'loss {loss:.3f}, lr {lr:.1e}, accuracy {metrics["top1"]:.2f} %')
            writer.writerow([epoch + 1, f'{loss:.6f}', f'{lr:.6g}', f'{metrics["top1"]:.4f}'])
            file.flush()
    return task, metrics
