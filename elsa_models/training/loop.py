"""The training loop for any `Job`, on timm's optimisers, schedules and tasks: killed at any step, it goes on there."""
import fnmatch
import logging
import math
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Dict, Iterable, List, NamedTuple, Optional, Tuple, Union

import torch
import torch.nn as nn
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import dispatch_clip_grad, distribute_bn, unwrap_model

from .._extras import require
from . import sharding
from .checkpoint import Checkpoints
from .config import BaseRecipe, RecipeError
from .job import Job
from .logs import TensorBoard, write_csv
from .signals import Stopped, asked_to_stop, between_steps
from .world import World, mix_seed, seed_all

_logger = logging.getLogger(__name__)

_STATE = ('epoch', 'step', 'steps', 'totals', 'model', 'ema', 'optimizer', 'scheduler', 'scaler', 'history', 'best')
LOG, TENSORBOARD, CHECKPOINTS = 'log.csv', 'tensorboard', 'checkpoints'


class DivergedError(RuntimeError):
    """A loss or weights that are not finite."""


def create_optimizer(
        recipe: BaseRecipe,
        model: nn.Module,
        steps_per_epoch: int,
) -> Tuple[torch.optim.Optimizer, Optional[Scheduler]]:
    """The optimiser and its schedule, which counts steps; None for no schedule.

    Args:
        recipe: Says which.
        model: Model to be trained; parameters without gradient are left out.
        steps_per_epoch: Steps in an epoch.

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
    try:
        scheduler, _ = create_scheduler_v2(
            optimizer,
            sched=recipe.sched,
            num_epochs=recipe.epochs,
            cooldown_epochs=recipe.cooldown_epochs,
            warmup_epochs=min(recipe.warmup_epochs, recipe.epochs / 2),
            warmup_lr=recipe.warmup_lr,
            min_lr=recipe.min_lr,
            step_on_epochs=False,
            updates_per_epoch=steps_per_epoch,
            **recipe.sched_args,
        )
    except TypeError as e:
        raise RecipeError(f'sched: {recipe.sched!r} with sched_args {recipe.sched_args} is not possible. {e}') from e
    return optimizer, scheduler


class Best(NamedTuple):
    """The best epoch so far."""
    epoch: int  # from 0
    value: float


class Trainer:
    """Trains a job from wherever its last checkpoint is to the end."""

    def __init__(self, recipe: BaseRecipe, job: Job, world: World, folder: Union[str, Path]) -> None:
        """
        Args:
            recipe: Says how.
            job: What is trained. Its task is wrapped as the recipe says.
            world: This process.
            folder: Where checkpoints and logs go; all processes see the same one.

        Raises:
            RecipeError: A value of the recipe does not fit the model.
        """
        self.recipe, self.job, self.world, self.folder = recipe, job, world, Path(folder)
        self.checkpoints = Checkpoints(self.folder / CHECKPOINTS, recipe.keep_checkpoints)
        self.steps = job.train_loader.steps
        self.epochs = recipe.epochs + recipe.cooldown_epochs
        self.epoch = 0  # the next
        self.step = 0  # the next in this epoch
        self.total = 0.  # of the losses of this epoch so far, of this process
        self.history: List[Dict[str, Any]] = []  # a row for each epoch
        self.best: Optional[Best] = None

        task, model = job.task, job.model
        if recipe.grad_checkpointing:
            if not hasattr(model, 'set_grad_checkpointing'):
                raise RecipeError(f'grad_checkpointing: {type(model).__name__} does not have it.')
            model.set_grad_checkpointing()
        if recipe.channels_last:
            model.to(memory_format=torch.channels_last)
        self._frozen = _matching(model, recipe.freeze)
        for name in self._frozen:
            model.get_submodule(name).requires_grad_(False)
        # what the job has frozen stays frozen, too
        self._learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        if not self._learning:
            raise RecipeError(f'freeze: {", ".join(recipe.freeze)} leaves nothing to train.')
        self.sharded = recipe.fsdp and world.size > 1
        if recipe.ema_decay is not None:  # weights that are spread and buffers that are not do not go in one call
            task.setup_ema(decay=recipe.ema_decay, use_warmup=recipe.ema_warmup, foreach=not self.sharded)
        if self.sharded:
            sharding.shard(model, world)
            if recipe.ema_decay is not None:
                sharding.shard(unwrap_model(task.get_trainable_module(ema=True)), world)
        self.optimizer, self.scheduler = create_optimizer(recipe, model, self.steps)
        self._dtype = getattr(torch, recipe.amp) if recipe.amp else None
        self.scaler = torch.amp.GradScaler(world.device.type, enabled=recipe.amp == 'float16')
        if recipe.compile:
            task.compile()
            if recipe.ema_decay is not None:
                task.compile_ema()
        self._inner = task.get_trainable_module()  # without DDP
        self._resting: Tuple[str, ...] = ()
        self._trains_head: Optional[bool] = None
        self.tensorboard = TensorBoard(None)

    @property
    def global_step(self) -> int:
        """Steps taken so far."""
        return self.epoch * self.steps + self.step

    def _lr(self) -> float:
        return max(group['lr'] for group in self.optimizer.param_groups)

    def _autocast(self) -> Any:
        return torch.autocast(self.world.device.type, self._dtype, enabled=self._dtype is not None)

    def _start_phase(self) -> None:
        """Let the classifier train alone, or all that is not frozen."""
        trains_head = self.epoch < self.recipe.head_epochs
        if trains_head == self._trains_head:
            return
        self._trains_head = trains_head
        model, head = self.job.model, self.job.head()
        self._resting = self._frozen
        if trains_head:
            self._resting += tuple(n for n, m in model.named_modules() if not any(_touches(n, h) for h in head))
        for name, parameter in model.named_parameters():
            alone = trains_head and not _is_below(name, head)
            parameter.requires_grad_(name in self._learning and not alone)
        if self.world.size > 1 and not self.sharded:
            # DDP looks at requires_grad once
            device = self.world.device
            self.job.task.trainable_module = self._inner
            self.job.task.prepare_distributed(device_ids=[device] if device.type == 'cuda' else None)

    def _train_mode(self) -> None:
        self.job.task.train()
        model = self.job.model
        for name in self._resting:  # no dropout, no statistics
            model.get_submodule(name).eval()

    def train_step(self, parts: Iterable[Any]) -> torch.Tensor:
        """Take one step.

        Args:
            parts: Batches whose gradients are accumulated.

        Returns:
            The loss, on the device.
        """
        recipe, job, task = self.recipe, self.job, self.job.task
        # a step draws the same numbers wherever the run was interrupted before
        seed_all(mix_seed(recipe.seed, self.world.rank, self.global_step), self.world.device)
        parts = list(parts)
        total = torch.zeros((), device=self.world.device)
        for i, batch in enumerate(parts):
            args = job.prepare(batch, self.epoch)
            if i == 0 and self.step == 0 and self.tensorboard.on:
                self.tensorboard.images(job.preview(args), self.global_step)
            with task.no_sync() if i + 1 < len(parts) else nullcontext():
                with self._autocast():
                    loss = task(*args)['loss'] / len(parts)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        if recipe.clip_grad:
            self.scaler.unscale_(self.optimizer)
            dispatch_clip_grad(task.get_clip_parameters(), recipe.clip_grad, mode=recipe.clip_mode)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()
        self.step += 1
        task.update_ema(step=self.global_step)
        if self.scheduler is not None:
            self.scheduler.step_update(self.global_step)
        return total

    def _train_epoch(self) -> Dict[str, Any]:
        """Train the rest of this epoch, and return what the log says of it."""
        recipe, world, loader = self.recipe, self.world, self.job.train_loader
        self._start_phase()
        self._train_mode()
        total = torch.tensor(self.total, dtype=torch.float64, device=_accurate(world.device))
        first, start = self.step, time.perf_counter()
        title = f'epoch {self.epoch + 1:{len(str(self.epochs))}}/{self.epochs}'
        with between_steps(), self.bar(total=self.steps, initial=first, desc=title, unit='step') as bar:
            for parts in loader.epoch(self.epoch, first):
                total += self.train_step(parts).to(total)
                bar.update()
                if self.step % recipe.log_steps == 0:
                    loss = self._finite(total) / self.step
                    speed = (self.step - first) * loader.batch_size / (time.perf_counter() - start)
                    left = (self.epochs * self.steps - self.global_step) * loader.batch_size / speed
                    bar.set_postfix_str(f'loss {loss:.3f}, {speed:.0f} images/s, {_duration(left)} to go')
                    self.tensorboard.scalars({
                        'train/loss': loss,
                        'train/lr': self._lr(),
                        'train/images_per_second': speed,
                    }, self.global_step)
                if recipe.checkpoint_steps and self.step % recipe.checkpoint_steps == 0 and self.step < self.steps:
                    self.total = self._finite(total)
                    self.save()
                    self._train_mode()
                self._stop_if_asked(total)
        mean = sum(world.gather(self._finite(total))) / (self.steps * world.size)
        seconds = time.perf_counter() - start
        return dict(
            epoch=self.epoch + 1,
            step=self.global_step,
            lr=self._lr(),
            train_loss=mean,
            images_per_second=(self.steps - first) * loader.batch_size / seconds,
            unreadable=sum(world.gather(loader.take_unreadable())),
        )

    def _stop_if_asked(self, total: torch.Tensor) -> None:
        """Keep what has been done and stop, where a signal has asked for it.

        Several processes ask each other when they look at the loss, which is when they wait for each other anyway.
        """
        asked = asked_to_stop()
        if self.world.size > 1:
            if self.step % self.recipe.log_steps:
                return
            asked = max(number or 0 for number in self.world.gather(asked))
        if asked:
            self.total = self._finite(total)
            self.save()
            raise Stopped(asked)

    def _finite(self, total: torch.Tensor) -> float:
        value = total.item()
        if not math.isfinite(value):
            raise DivergedError(
                f'the loss of epoch {self.epoch + 1} is {value}, before or at step {self.step} of {self.steps}. A lower'
                f' lr, more warmup_epochs or clip_grad may help. The last good checkpoint is kept.')
        return value

    def evaluate(self) -> Dict[str, float]:
        """Metrics of the model, or of its moving average where there is one."""
        task = self.job.task
        task.eval()
        ema = task.has_ema()
        model = task.get_eval_model(ema=ema)
        if not ema and hasattr(model, 'no_sync'):  # evaluation needs no DDP
            model = model.module
        if self.world.size > 1:  # statistics of batches: those that are saved
            distribute_bn(model, self.world.size, reduce=False)
        with torch.no_grad(), self._autocast():
            return self.job.evaluate(model)

    def run(self) -> None:
        """Train to the end, from the newest checkpoint on.

        Raises:
            DivergedError: The loss or the weights are not finite.
            OutputError: A checkpoint cannot be written, or none of those there are can be read.
            DataError: The data cannot be read.
        """
        main = self.world.is_main
        if main:
            self.checkpoints.create_folder()
        self.resume()
        tqdm = require('tqdm').tqdm
        self.bar = lambda **kwargs: tqdm(dynamic_ncols=True, disable=None if main else True, **kwargs)
        on = self.recipe.tensorboard and main
        self.tensorboard = TensorBoard(self.folder / TENSORBOARD if on else None, self.global_step)
        try:
            while self.epoch < self.epochs:
                row = self._train_epoch()
                metrics = self.evaluate()
                row.update((f'val_{name}', value) for name, value in metrics.items())
                self._end_epoch(row, metrics[self.job.metric])
        finally:
            self.tensorboard.close()

    def _end_epoch(self, row: Dict[str, Any], value: float) -> None:
        if row['unreadable']:
            _logger.warning(
                'in epoch %d, attempts at images that cannot be read: %d', row['epoch'], row['unreadable'])
        self.history.append(row)
        sign = 1. if self.job.higher_is_better else -1.
        is_best = self.best is None or sign * value >= sign * self.best.value
        if is_best:
            self.best = Best(self.epoch, value)
        self.epoch, self.step, self.total = self.epoch + 1, 0, 0.
        self.save(is_best)
        if self.world.is_main:
            write_csv(self.history, self.folder / LOG)
            self.tensorboard.scalars({f'epoch/{name}': float(v) for name, v in row.items()}, self.global_step)
            metrics = self.job.show({name[4:]: v for name, v in row.items() if name.startswith('val_')})
            _logger.info('epoch %d: loss %.4g; held out: %s', row['epoch'], row['train_loss'], metrics)

    def save(self, is_best: bool = False) -> None:
        """Write a checkpoint; all processes take part.

        Args:
            is_best: Whether the weights are the best so far.

        Raises:
            DivergedError: The weights are not finite.
            OutputError: The disk is full or fails.
        """
        task, model = self.job.task, self.job.model
        ema = unwrap_model(task.get_trainable_module(ema=True)) if task.has_ema() else None
        weights = sharding.full_state(model) if self.sharded else model.state_dict()
        averaged = None
        if ema is not None:
            averaged = sharding.full_state(ema) if self.sharded else ema.state_dict()
        optimizer = (
            sharding.full_optimizer_state(model, self.optimizer) if self.sharded else self.optimizer.state_dict())
        totals = self.world.gather(self.total)
        if not self.world.is_main:
            return
        for name, x in weights.items():
            if x.is_floating_point() and not x.isfinite().all():
                raise DivergedError(
                    f'{name} is no longer finite at step {self.global_step}. A lower lr, more warmup_epochs or'
                    f' clip_grad may help. The last good checkpoint is kept.')
        if is_best:
            self.checkpoints.save_best(dict(model=weights if averaged is None else averaged, epoch=self.best.epoch))
        # the generators have no state to keep: they are seeded by step, and those of images by epoch and number
        self.checkpoints.save(self.global_step, dict(
            version=1,
            epoch=self.epoch,
            step=self.step,
            steps=self.steps,
            totals=totals,
            model=weights,
            ema=averaged,
            optimizer=optimizer,
            scheduler=self.scheduler.state_dict() if self.scheduler is not None else None,
            scaler=self.scaler.state_dict(),
            history=self.history,
            best=tuple(self.best) if self.best is not None else None,
        ))

    def resume(self) -> None:
        """Go back to the newest checkpoint that can be read, if there is any.

        Raises:
            RecipeError: It is of other data or another model.
        """
        state = self.checkpoints.load_newest(_STATE)
        if state is None:
            return
        if state['steps'] != self.steps:
            raise RecipeError(
                f'resume: an epoch of the unfinished run had {state["steps"]} steps, now it has {self.steps}: the data'
                f' is another. Start afresh with resume: false (--no-resume).')
        task, model = self.job.task, self.job.model
        ema = unwrap_model(task.get_trainable_module(ema=True)) if task.has_ema() else None
        if self.sharded:
            sharding.load_full_state(model, state['model'])
            sharding.load_full_optimizer_state(model, self.optimizer, state['optimizer'])
            if ema is not None:
                sharding.load_full_state(ema, state['ema'])
        else:
            model.load_state_dict(state['model'])
            self.optimizer.load_state_dict(state['optimizer'])
            if ema is not None:
                ema.load_state_dict(state['ema'])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state['scheduler'])
        self.scaler.load_state_dict(state['scaler'])
        self.epoch, self.step, self.history = state['epoch'], state['step'], state['history']
        self.total = state['totals'][self.world.rank] if len(state['totals']) == self.world.size else (
            sum(state['totals']) / len(state['totals']))
        self.best = Best(*state['best']) if state['best'] is not None else None
        if self.world.is_main:
            if self.history:  # a kill may have come between checkpoint and log
                write_csv(self.history, self.folder / LOG)
            _logger.info('goes on from epoch %d, step %d of %d', self.epoch + 1, self.step, self.steps)

    def best_model(self) -> nn.Module:
        """The model with the weights of the best epoch, in evaluation mode, whole."""
        model = self.job.whole_model() if self.sharded else self.job.model
        model.load_state_dict(self.checkpoints.load_best()['model'])
        return model.to(memory_format=torch.contiguous_format).eval()


def _matching(model: nn.Module, patterns: Iterable[str]) -> Tuple[str, ...]:
    names = [name for name, _ in model.named_modules() if name]
    found = []
    for pattern in patterns:
        matches = fnmatch.filter(names, pattern)
        if not matches:
            top = ', '.join(name for name, _ in model.named_children())
            raise RecipeError(f'freeze: {pattern!r} is the name of no module; the topmost are {top}.')
        found += matches
    return tuple(found)


def _is_below(name: str, modules: Iterable[str]) -> bool:
    return any(name == m or name.startswith(m + '.') for m in modules)


def _touches(name: str, module: str) -> bool:
    """Whether one of two modules holds the other, or they are the same."""
    return name in ('', module) or name.startswith(module + '.') or module.startswith(name + '.')


def _accurate(device: torch.device) -> torch.device:
    return torch.device('cpu') if device.type == 'mps' else device  # which has no float64


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f'{seconds:.0f} s' if minutes < 2 else f'{minutes} min' if minutes < 120 else f'{minutes / 60:.1f} h'
