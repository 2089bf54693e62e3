"""Pictures for a person: what a model predicts, and where its local attention looks."""
import io
import logging
import math
import warnings
from pathlib import Path
from typing import Any, Callable, Dict, List, Sequence, Union

import torch
import torch.nn as nn

from .._extras import require
from .._files import write_atomically
from .._fonts import families_for, legible, shorten
from .._images import normalise, read_image, to_picture
from ..inspect import AttentionLayer, attention_layers
from .classifier import Answer, Classifier, Predictions, color_mode, create_eval_transform
from .text import write_csv

_RIGHT, _WRONG, _QUERY = '#1b7837', '#c51b2b', '#ff7f0e'
_MAX_HEADS = 6  # drawn for each layer


def draw_curves(history: List[Dict[str, float]], path: Union[str, Path]) -> None:
    """Draw loss and metrics over the epochs.

    Args:
        history: A row for each epoch, as in the log.
        path: PNG to write.
    """
    metrics = [k for k in history[-1] if k.startswith('val_') and k not in ('val_loss', 'val_images')]
    epochs = [row['epoch'] for row in history]
    figure = _new_figure(11., 4.2)
    left, right = figure.subplots(1, 2)
    for name, label, color in (('train_loss', 'training', _QUERY), ('val_loss', 'held-out images', '#2f6fb0')):
        if name in history[-1]:
            left.plot(epochs, [row[name] for row in history], label=label, color=color, marker='.')
    left.set_title('loss')
    for name in metrics:
        right.plot(epochs, [row[name] for row in history], label=name[4:].replace('_', ' '), marker='.')
    right.set_title('held-out images')
    right.set_ylabel('accuracy (%)')
    for ax in (left, right):
        ax.set_xlabel('epoch')
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        if ax.has_data():
            ax.legend(frameon=False)
    _save(figure, path)


def draw_confusion(
        targets: torch.Tensor,
        predicted: torch.Tensor,
        class_names: List[str],
        path: Union[str, Path],
) -> None:
    """Draw which classes are taken for which: part of each true class in a row. Numbers for up to 25 classes.

    Args:
        targets: (N,) classes.
        predicted: (N,) classes.
        class_names: Name of each class.
        path: PNG to write.
    """
    number = len(class_names)
    counts = torch.bincount(targets * number + predicted, minlength=number ** 2).view(number, number)
    parts = counts / counts.sum(dim=1, keepdim=True).clamp(min=1)
    figure = _new_figure(*[min(14., max(5., 0.5 * number + 2.5))] * 2)
    ax = figure.subplots()
    image = ax.imshow(parts.numpy(), cmap='Blues', vmin=0., vmax=1.)
    figure.colorbar(image, ax=ax, shrink=0.8, label='part of the true class')
    ax.set_ylabel('true class')
    names = legible(class_names)
    if number <= 40:
        ax.set_xticks(range(number), names, rotation=90)
        ax.set_yticks(range(number), names)
    numbered = number > 40 or names != [shorten(name) for name in class_names]
    ax.set_xlabel('predicted class' + '; numbers are those of classes.csv' * numbered)
    if number <= 25:
        for i in range(number):
            for j in range(number):
                if counts[i, j]:
                    color = 'white' if parts[i, j] > 0.5 else 'black'
                    ax.text(j, i, str(counts[i, j].item()), ha='center', va='center', fontsize=8, color=color)
    right = counts.diagonal().sum().item()
    figure.suptitle(
        f'{right} of {len(targets)} held-out images\nare recognised: {100 * right / len(targets):.2f} %', fontsize=12)
    _save(figure, path)


def write_classes(
        targets: torch.Tensor,
        predicted: torch.Tensor,
        class_names: List[str],
        path: Union[str, Path],
) -> None:
    """Write how well each class is recognised: images, precision, recall and F1 in percent; empty where undefined.

    Args:
        targets: (N,) classes.
        predicted: (N,) classes.
        class_names: Name of each class.
        path: CSV to write.
    """
    rows: List[List[Any]] = [['number', 'class', 'images', 'precision', 'recall', 'f1']]
    for i, name in enumerate(class_names):
        there, said = (targets == i).sum().item(), (predicted == i).sum().item()
        hits = ((targets == i) & (predicted == i)).sum().item()
        parts = ((hits, said), (hits, there), (2 * hits, said + there))
        rows.append([i, name, there, *(f'{100. * a / b:.2f}' if b else '' for a, b in parts)])
    write_csv(rows, path)


def draw_predictions(
        images: Any,
        predictions: Predictions,
        class_names: List[str],
        path: Union[str, Path],
        rows: int = 5,
        columns: int = 8,
) -> None:
    """Draw a grid of images with predicted class and confidence: mistakes first, in red, then a sample of the rest.

    Args:
        images: The images, which `image` gives by their number.
        predictions: What was predicted for them.
        class_names: Name of each class.
        path: PNG to write.
        rows: Rows of the grid, at most.
        columns: Columns of the grid, at most.
    """
    names = legible(class_names)
    targets, predicted, confidence, index = (
        predictions.targets, predictions.predicted, predictions.confidence, predictions.index)
    wrong = (predicted != targets).nonzero().flatten().tolist()
    right = (predicted == targets).nonzero().flatten().tolist()
    space = min(rows * columns, len(targets))
    shown = wrong[:max(space // 2, space - len(right))]
    number = min(space - len(shown), len(right))
    sample = [right[i * len(right) // number] for i in range(number)]
    columns = min(columns, max(1, len(shown) + number))
    rows = math.ceil((len(shown) + number) / columns)

    figure = _new_figure(max(1.35 * columns, 8.), 1.85 * rows + 1.15)
    accuracy = 100 * len(right) / len(targets)
    mistakes = f'{len(shown)} of the {len(wrong)} mistakes' if len(shown) < len(wrong) else 'every mistake'
    note = f'{mistakes} in red first' if wrong else 'no mistakes were made'
    figure.suptitle(
        f'{len(right)} of {len(targets)} held-out images are recognised: {accuracy:.2f} %',
        fontsize=14, fontweight='bold')
    if names != [shorten(name) for name in class_names]:
        note += '; numbers are those of classes.csv'
    figure.supxlabel(f'Predicted class and confidence; {note}.', fontsize=10, color='0.3')
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis('off')
    for ax, i in zip(axes, shown + sample, strict=False):
        _show(ax, images.image(index[i]))
        name = names[predicted[i]]
        if predicted[i] == targets[i]:
            text, color = f'{name}\n{confidence[i]:.0%}', _RIGHT
        else:
            text, color = f'{name},\nnot {names[targets[i]]}\n{confidence[i]:.0%}', _WRONG
        longest = max(map(len, text.splitlines()))
        ax.set_title(text, fontsize=10 if longest < 13 else 7 if longest < 17 else 6, color=color, pad=3)
    _save(figure, path)


def draw_attention(
        model: nn.Module,
        load: Callable[[int], torch.Tensor],
        data_config: Dict[str, Any],
        predictions: Predictions,
        class_names: List[str],
        path: Union[str, Path],
) -> None:
    """Draw the local attention of one image: a row for each resolution at which the model attends locally.

    The image is the first that is recognised. A row shows the neighbourhood of one pixel of the map, how each head
    spreads its attention over it, and for every pixel the part of its neighbours over which attention spreads: the
    exponential of the entropy, averaged over the heads, over K * K. The query is the pixel of the first map where that
    part is smallest, of those whose neighbourhood lies inside of the image.

    Args:
        model: Model with local attention, see `elsa_models.inspect.has_local_attention`.
        load: Gives an image of the data set, by its number, as the model takes it: (C, H, W), normalised.
        data_config: Its mean and std, by which it was.
        predictions: What was predicted for them.
        class_names: Name of each class.
        path: PNG to write.

    Raises:
        ValueError: The model has no local attention.
    """
    predicted = predictions.predicted
    recognised = (predicted == predictions.targets).nonzero().flatten().tolist()
    index = recognised[0] if recognised else 0
    tensor = load(predictions.index[index].item())
    layers = {tuple(layer.weights.shape[:2]): layer for layer in attention_layers(model, tensor)}
    if not layers:
        raise ValueError('model: has no local attention to draw.')
    layers = list(layers.values())  # the last of each resolution
    picture = to_picture(tensor, data_config['mean'], data_config['std'])
    size = picture.shape[:2]
    y, x = _choose_query(layers[0])
    y, x = (y + 0.5) / layers[0].weights.shape[0], (x + 0.5) / layers[0].weights.shape[1]

    heads = min(_MAX_HEADS, max(layer.weights.shape[2] for layer in layers))
    figure = _new_figure(2.5 * (heads + 2) + 0.6, 2.7 * len(layers) + 1.8)
    as_class = f', recognised as “{legible(class_names)[predicted[index]]}”' if recognised else ''
    figure.suptitle(f'Where a pixel looks: local attention on a held-out image{as_class}', fontsize=15,
                    fontweight='bold')
    grid = figure.add_gridspec(len(layers) + 1, heads + 2, height_ratios=[1.] * len(layers) + [0.07])
    # the root spreads the many small weights over the colours
    norm = require('matplotlib.colors').PowerNorm(0.5, 0., max(_at(layer, y, x).max().item() for layer in layers))
    for row, layer in enumerate(layers):
        H, W, num_heads, K, _ = layer.weights.shape
        i, j = int(y * H), int(x * W)
        ax = figure.add_subplot(grid[row, 0])
        ax.imshow(picture, cmap='gray', vmin=0., vmax=1.)
        _outline(ax, i, j, layer, (size[0] / H, size[1] / W))
        ax.set_title('image and neighbourhood', fontsize=10)
        ax.set_ylabel(f'map of {H} × {W} pixels\n{K} × {K} neighbours', fontsize=10)
        _clean(ax)
        ax = figure.add_subplot(grid[row, 1])
        spread = ax.imshow((_spread(layer) / K ** 2).numpy(), cmap='magma', vmin=0., vmax=1., extent=(0, W, H, 0))
        _frame(ax, j, i, 1, 1, _QUERY, 2.)
        ax.set_title('spread of each pixel', fontsize=10)
        _clean(ax)
        for head in range(min(num_heads, heads)):
            ax = figure.add_subplot(grid[row, 2 + head])
            weights = ax.imshow(_at(layer, y, x)[head].numpy(), cmap='viridis', norm=norm)
            _hatch_outside(ax, i, j, layer)
            _frame(ax, K // 2 - 0.5, K // 2 - 0.5, 1, 1, _QUERY, 2.)
            of_all = f' of {num_heads}' if num_heads > heads else ''
            ax.set_title(f'attention of head {head + 1}{of_all}', fontsize=10)
            _clean(ax)
    for image, place, label in (
            (spread, grid[-1, 1], 'part of the neighbours in use'),
            (weights, grid[-1, 2:], 'weight of a neighbour; those of a head add up to 1')):
        figure.colorbar(image, cax=figure.add_subplot(place), orientation='horizontal', label=label)
    figure.supxlabel(
        'Orange: the pixel that looks. Blue: its neighbours, whose weights the heads show. Hatched: beyond the image.\n'
        'Spread: exp(entropy) of the attention over the number of neighbours, mean of the heads; dark pixels look at'
        ' few of them.', fontsize=10, color='0.3')
    _save(figure, path)


def draw_contact_sheet(
        answers: Sequence[Answer],
        path: Union[str, Path],
        columns: int = 6,
        most: int = 60,
) -> None:
    """Draw a grid of images with their likeliest classes.

    Args:
        answers: Images and classes.
        path: PNG to write.
        columns: Columns of the grid, at most.
        most: Images to show, at most.
    """
    shown = answers[:most]
    columns = min(columns, len(shown))
    rows = math.ceil(len(shown) / columns)
    figure = _new_figure(max(2.1 * columns, 3.), 2.5 * rows + 0.4)
    axes = figure.subplots(rows, columns, squeeze=False).flatten()
    for ax in axes:
        ax.axis('off')
    numbered = False
    for ax, answer in zip(axes, shown, strict=False):
        _show(ax, _thumbnail(answer.file))
        names = legible(answer.labels[:3], answer.classes[:3])
        numbered |= names != [shorten(label) for label in answer.labels[:3]]
        lines = [f'{name} {p:.0%}' for name, p in zip(names, answer.probabilities, strict=False)]
        ax.set_title('\n'.join(lines), fontsize=8, pad=3)
    notes = [f'the first {len(shown)} of {len(answers)} images'] * (len(shown) < len(answers))
    notes += ['no font here has the names that are numbers; the table has them'] * numbered
    if notes:
        figure.supxlabel('\n'.join(notes), fontsize=8, color='0.3')
    _save(figure, path)


def draw_overlays(
        classifier: Classifier,
        answers: Sequence[Answer],
        path: Union[str, Path],
        most: int = 8,
) -> None:
    """Draw over images how sharp local attention is: a row for each image, a column for each resolution.

    The colour is the part of its K * K neighbours over which a pixel spreads its attention, exp(entropy) / K * K, mean
    of the heads, of the last layer of that resolution.

    Args:
        classifier: Holds a model with local attention.
        answers: Images and classes.
        path: PNG to write.
        most: Images to show, at most.
    """
    config = classifier.data_config
    transform = create_eval_transform(config)
    rows = []
    for answer in answers[:most]:
        image = read_image(Path(answer.file), color_mode(config), answer.file)
        tensor = normalise(torch.as_tensor(transform(image)), config['mean'], config['std'])
        layers = {tuple(layer.weights.shape[:2]): layer for layer in attention_layers(classifier.model, tensor)}
        rows.append((answer, to_picture(tensor, config['mean'], config['std']), list(layers.values())))
    columns = 1 + max(len(layers) for _, _, layers in rows)
    figure = _new_figure(2.6 * columns + 0.8, 2.9 * len(rows) + 1.)
    axes = figure.subplots(len(rows), columns, squeeze=False)
    for row, (answer, picture, layers) in zip(axes, rows, strict=True):
        for ax in row:
            _clean(ax)
        row[0].imshow(picture, cmap='gray', vmin=0., vmax=1.)
        name, = legible(answer.labels[:1], answer.classes[:1])
        row[0].set_title(f'{name} {answer.probabilities[0]:.0%}', fontsize=10)
        height, width = picture.shape[:2]
        for ax, layer in zip(row[1:], layers, strict=False):
            grey = picture if picture.ndim == 2 else picture.mean(axis=2)
            ax.imshow(grey, cmap='gray', vmin=0., vmax=1., extent=(0, width, height, 0))
            spread = ax.imshow(
                (_spread(layer) / layer.kernel_size ** 2).numpy(), cmap='magma', vmin=0., vmax=1., alpha=0.6,
                extent=(0, width, height, 0), interpolation='bilinear')
            H, W = layer.weights.shape[:2]
            ax.set_title(f'map of {H} × {W}, {layer.kernel_size} × {layer.kernel_size} neighbours', fontsize=9)
    figure.colorbar(spread, ax=axes, shrink=0.6, label='part of the neighbours in use')
    _save(figure, path)


def _thumbnail(file: str) -> Any:
    image = read_image(Path(file), 'RGB', file)
    image.thumbnail((400, 400))
    return image


def _choose_query(layer: AttentionLayer) -> List[int]:
    H, W = layer.weights.shape[:2]
    spread, r = _spread(layer), layer.kernel_size // 2 * layer.dilation
    inside = torch.full_like(spread, math.inf)
    if H > 2 * r and W > 2 * r:
        inside[r:H - r, r:W - r] = spread[r:H - r, r:W - r]
    else:
        inside = spread
    return list(divmod(inside.argmin().item(), W))


def _spread(layer: AttentionLayer) -> torch.Tensor:
    """Number of neighbours (H, W) over which attention spreads: 1 to K * K."""
    weights = layer.weights.flatten(3)
    entropy = -torch.xlogy(weights, weights).sum(dim=-1)
    return entropy.exp().mean(dim=-1)


def _at(layer: AttentionLayer, y: float, x: float) -> torch.Tensor:
    """Weights (heads, K, K) of the pixel at a place given in parts of height and width."""
    H, W = layer.weights.shape[:2]
    return layer.weights[int(y * H), int(x * W)]


def _outline(ax: Any, i: int, j: int, layer: AttentionLayer, cell: Any) -> None:
    """Frame a pixel of the map and its neighbourhood on the image."""
    H, W = layer.weights.shape[:2]
    r = layer.kernel_size // 2 * layer.dilation
    top, bottom, left, right = max(0, i - r), min(H, i + r + 1), max(0, j - r), min(W, j + r + 1)
    _frame(ax, left * cell[1] - 0.5, top * cell[0] - 0.5, (right - left) * cell[1], (bottom - top) * cell[0],
           '#2f9bff', 2.2)
    _frame(ax, j * cell[1] - 0.5, i * cell[0] - 0.5, cell[1], cell[0], _QUERY, 1.8)


def _hatch_outside(ax: Any, i: int, j: int, layer: AttentionLayer) -> None:
    Rectangle = require('matplotlib.patches').Rectangle
    H, W = layer.weights.shape[:2]
    K, d = layer.kernel_size, layer.dilation
    for a in range(K):
        for b in range(K):
            if not (0 <= i + (a - K // 2) * d < H and 0 <= j + (b - K // 2) * d < W):
                ax.add_patch(Rectangle(
                    (b - 0.5, a - 0.5), 1, 1, facecolor='none', edgecolor='0.8', hatch='///', linewidth=0.))


def _frame(ax: Any, x: float, y: float, width: float, height: float, color: str, linewidth: float) -> None:
    Rectangle = require('matplotlib.patches').Rectangle
    ax.add_patch(Rectangle(
        (x, y), width, height, facecolor='none', edgecolor=color, linewidth=linewidth, clip_on=False))


def _new_figure(width: float, height: float) -> Any:
    # no pyplot: nothing of the user's own figures and backend is touched
    figure = require('matplotlib.figure').Figure(figsize=(width, height), layout='constrained', facecolor='white')
    require('matplotlib.backends.backend_agg').FigureCanvasAgg(figure)
    return figure


def _save(figure: Any, path: Union[str, Path]) -> None:
    texts = [text for text in figure.findobj(require('matplotlib.text').Text) if text.get_text()]
    families = families_for(text.get_text() for text in texts)
    for text in texts:
        text.set_fontfamily(families)
        text.set_parse_math(False)  # a class may be called $x^{$
    content = io.BytesIO()
    logger = logging.getLogger('matplotlib')
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of layout and fonts
            figure.savefig(content, dpi=130, format='png')
    finally:
        logger.setLevel(level)
    write_atomically(content.getvalue(), path)


def _show(ax: Any, image: Any) -> None:
    ax.imshow(image, cmap='gray', vmin=0, vmax=255, interpolation='nearest' if max(image.size) < 64 else None)


def _clean(ax: Any) -> None:
    ax.set_xticks([])
    ax.set_yticks([])
