"""Pictures of what a model learned: its filters, positions, and attention, and maps of classes."""

import io

import keras
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from keras_vit.attention import (
    attention_distance,
    attention_gradients,
    attention_relevance,
    attention_rollout,
    attention_scores,
    patch_weights,
)
from keras_vit.embeddings import patch_filters, position_similarity
from keras_vit.layers import PositionEmbedding
from keras_vit.model import augmented_for_display
from keras_vit.reporting.drawing import BLUE, GREY, ORANGE, STYLE, LocalizedTicks, fitted, save
from keras_vit.reporting.explorer import data_uri, png_uri
from keras_vit.reporting.texts import load_texts, localize
from keras_vit.transfer import grid

MAX_IMAGES = 64
MAX_SCORES = 2**24  # At a time: 64 MiB.
MAX_MAPS = 12  # In a row of position embeddings.
HIGHLIGHT = 255 * np.array(to_rgb(ORANGE))
HESITANT = 3  # Test images whose maps of two classes are drawn.


def draw_all(model, images, probabilities, class_names, folder, source=None, language="en"):
    """Draws the four pictures of what a model learned.

    Args:
        model: a trained `VisionTransformer`.
        images: array `(N, H, W, C)` of raw pixels, the test images.
        probabilities: array `(N, num_classes)`, predicted for them.
        class_names: list of strings.
        folder: `Path` of an existing folder.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    common = {"source": source, "language": language}
    draw_patch_filters(model, folder / "patch_filters.png", **common)
    draw_position_similarity(model, folder / "position_similarity.png", **common)
    path = folder / "attention_distance.png"
    # Those of a folder come class by class.
    some = images[_spread(len(images), MAX_IMAGES)]
    draw_attention_distance(model, some, path, **common)
    # Where the model hesitates between two classes, it sees something of both.
    likeliest = probabilities.argsort(axis=1)[:, ::-1][:, :2]
    second = np.take_along_axis(probabilities, likeliest[:, -1:], axis=1)[:, 0]
    chosen = second.argsort(kind="stable")[::-1][:HESITANT]
    rows, classes = np.repeat(chosen, likeliest.shape[1]), likeliest[chosen].ravel()
    titles = [f"{class_names[j]} {probabilities[i, j]:.0%}" for i, j in zip(rows, classes)]
    draw_class_maps(model, images[rows], classes, titles, folder / "class_maps.png", **common)


def embedded_pictures(model):
    """The pictures of the two embeddings for a page, without titles and scales.

    Args:
        model: a `VisionTransformer`.

    Returns:
        Dictionary of `filters`, the principal components, pairs of a data URI and the fraction of
        the variance that it explains; `positions`, a data URI; and `low`, the similarity that is
        darkest in it, where one is brightest.
    """
    patch_size = model.get_layer("patches").patch_size
    kernel = keras.ops.convert_to_numpy(model.get_layer("patch_embedding").kernel)
    mosaic, low, _, _ = _mosaic(model)
    file = io.BytesIO()
    plt.imsave(file, mosaic, cmap="viridis", vmin=low, vmax=1, format="png")
    return {
        "filters": [
            (data_uri(_filter_as_bytes(pattern)), float(fraction))
            for pattern, fraction in zip(*patch_filters(kernel, patch_size))
        ],
        "positions": png_uri(file.getvalue()),
        "low": low,
    }


def draw_patch_filters(model, path, source=None, language="en"):
    """The first principal components of the filters of the patch embedding.

    Args:
        model: a `VisionTransformer`.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["patch_filters"]
    patch_size = model.get_layer("patches").patch_size
    kernel = keras.ops.convert_to_numpy(model.get_layer("patch_embedding").kernel)
    filters, explained = patch_filters(kernel, patch_size)
    columns = min(len(filters), 7)
    rows = -(-len(filters) // columns)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(8, 1.25 * rows + 0.9))
        for number, (pattern, fraction) in enumerate(zip(filters, explained)):
            row, column = divmod(number, columns)
            top, left = 1.25 * row, 1.1 * column
            _show_at(axis, _filter_as_bytes(pattern), top, left)
            percent = localize(f"{100 * fraction:.1f}", language)
            axis.text(left + 0.5, top + 1.03, percent, ha="center", va="top", fontsize=8)
        axis.set(xlim=(0, 1.1 * columns - 0.1), ylim=(1.25 * rows, 0))
        sizes = {"count": len(filters), "filters": kernel.shape[1], "size": patch_size}
        axis.set_title(texts["title"].format(**sizes))
        figure.supxlabel(texts["scale"], fontsize=9)
        save(figure, path, source)


def draw_position_similarity(model, path, source=None, language="en"):
    """The similarity of the position embedding of each patch to all others: a grid of grids.

    Of very many patches, some rows and columns are drawn. For a model without position embeddings,
    the picture says so.

    Args:
        model: a `VisionTransformer`.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["position_similarity"]
    layer = next((x for x in model.layers if isinstance(x, PositionEmbedding)), None)
    with plt.rc_context(STYLE):
        if layer is None:
            figure, axis = plt.subplots(figsize=(6, 2))
            axis.axis("off")
            axis.text(0.5, 0.5, texts["none"], ha="center", va="center")
            return save(figure, path, source)
        mosaic, low, rows, columns = _mosaic(model)
        height, width = grid(model)
        cells = max(mosaic.shape)
        figure, axis = plt.subplots(
            figsize=(2 + 6 * mosaic.shape[1] / cells, 0.8 + 6 * mosaic.shape[0] / cells)
        )
        drawn = axis.imshow(mosaic, cmap="viridis", vmin=low, vmax=1)
        axis.set_xticks((width + 1) * np.arange(len(columns)) + (width - 1) / 2, columns + 1)
        axis.set_yticks((height + 1) * np.arange(len(rows)) + (height - 1) / 2, rows + 1)
        axis.tick_params(length=0)
        for spine in axis.spines.values():
            spine.set_visible(False)
        axis.set_xlabel(texts["column"])
        axis.set_ylabel(texts["row"])
        bar = figure.colorbar(drawn, ax=axis, shrink=0.6, format=LocalizedTicks(language))
        bar.set_label(texts["similarity"])
        bar.outline.set_visible(False)
        save(figure, path, source)


def draw_attention_distance(model, images, path, source=None, language="en"):
    """The mean attention distance of each head, by block.

    Args:
        model: a `VisionTransformer`.
        images: array `(B, H, W, C)` of raw pixels, over which distances are averaged.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["attention_distance"]
    class_token, patch_size = model.pooling == "token", model.get_layer("patches").patch_size
    place = {"grid": grid(model), "patch_size": patch_size, "class_token": class_token}
    first = attention_scores(model, images[:1])
    uniform = attention_distance(np.ones_like(first), **place).mean()
    size = max(1, MAX_SCORES // first.size)
    distances = np.concatenate(
        [
            attention_distance(attention_scores(model, images[start : start + size]), **place)
            for start in range(0, len(images), size)
        ]
    ).mean(axis=0)
    depth, heads = distances.shape
    blocks = np.arange(1, depth + 1)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(7, 4.4))
        axis.axhline(uniform, color=GREY, linestyle="--", label=texts["uniform"])
        # The mark shows the mean of a single block, too.
        mark = {"marker": "_", "markersize": 16, "markeredgewidth": 3}
        axis.plot(blocks, distances.mean(axis=1), color=ORANGE, label=texts["mean"], **mark)
        # The head of the model reads nothing of the last block but the class token.
        unread = depth if class_token else None
        for block, values in zip(blocks, distances):
            fill = "white" if block == unread else BLUE
            style = {"facecolor": fill, "edgecolor": BLUE, "zorder": 3, "s": 45}
            axis.scatter(np.full(heads, block), values, **style)
        axis.scatter([], [], color=BLUE, s=45, label=texts["head"])
        if unread:
            axis.scatter([], [], facecolor="white", edgecolor=BLUE, s=45, label=texts["unread"])
        axis.set_ylim(0, 1.1 * max(uniform, distances.max(), 1e-9))
        axis.set_xlim(0.5, depth + 0.5)
        axis.set_xlabel(texts["block"])
        axis.set_ylabel(texts["distance"])
        axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
        axis.yaxis.set_major_formatter(LocalizedTicks(language))
        axis.grid(alpha=0.25)
        figure.legend(loc="outside lower center", fontsize=9)
        axis.set_title(texts["title"].format(count=len(images)))
        save(figure, path, source)


def draw_class_maps(model, images, classes, titles, path, source=None, language="en"):
    """The evidence for a class in each image, beside Attention Rollout, which knows no classes.

    Args:
        model: a `VisionTransformer`.
        images: array `(B, H, W, C)` of raw pixels; an image may be repeated with another class.
        classes: integer array `(B,)`, the class of each map.
        titles: list of strings, one for each class.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]
    scores, gradients = (
        attention_scores(model, images),
        attention_gradients(model, images, classes),
    )
    class_token, patch_size = model.pooling == "token", model.get_layer("patches").patch_size
    maps = [
        attention_rollout(scores),
        attention_rollout(scores, class_token=class_token, gradients=gradients),
        attention_relevance(scores, gradients),
    ]
    maps = [patch_weights(x, class_token).reshape(-1, *grid(model)) for x in maps]
    model_inputs = augmented_for_display(model.augmentation, images)
    both, own = texts["attention_rollout"], texts["class_maps"]
    headings = [
        *(both["image"], both["rollout"]),
        *(own["gradient_rollout"], own["relevance"], own["overlay"]),
    ]
    sizes = images.shape[1:3], model_inputs.shape[1:3]
    aspects = [width / height for height, width in sizes]
    side = 1.75 / max(1, *aspects)  # Inches, of a row.
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 5, figsize=(9.5, 1.05 * side * len(images) + 0.8))
        for number, (image, model_input, title, *of_image) in enumerate(
            zip(images, model_inputs, titles, *maps)
        ):
            top = 1.05 * number
            title, size = fitted(title, side, 10)
            middle = {"ha": "right", "va": "center", "rotation": 90}
            axes[0].text(-0.05, top + 0.5, title, fontsize=size, **middle)
            _show_at(axes[0], _as_bytes(image), top, width=aspects[0])
            for axis, values in zip(axes[1:], of_image):
                _show_at(axis, values, top, width=aspects[1], cmap="viridis")
            relevance = of_image[-1]
            strength = (relevance - relevance.min()) / max(np.ptp(relevance), 1e-12)
            enlarged = np.kron(strength, np.ones((patch_size, patch_size)))[..., None]
            # In grey, so that the only colour is relevance, on dark and on light images.
            grey = model_input[..., :3].mean(axis=-1, keepdims=True)
            highlighted = _as_bytes(grey + 0.7 * enlarged * (HIGHLIGHT - grey))
            _show_at(axes[4], highlighted, top, width=aspects[1])
        for axis, heading, aspect in zip(axes, headings, [aspects[0], *4 * aspects[1:]]):
            axis.set(xlim=(0, aspect), ylim=(1.05 * len(images) - 0.05, 0))
            axis.set_title(heading, fontsize=10)
        figure.supxlabel(both["scale"], fontsize=9)
        save(figure, path, source)


def _mosaic(model):
    """The similarity of positions as a grid of grids, with a cell of NaN between two maps.

    Also its smallest value or zero, and the rows and columns of the patches that it has maps of.
    """
    positions = keras.ops.convert_to_numpy(model.get_layer("position_embedding").position)[0]
    height, width = sizes = grid(model)
    similarity = position_similarity(positions, sizes, model.pooling == "token")
    rows, columns = (_spread(size, MAX_MAPS) for size in sizes)
    mosaic = np.full((len(rows), height + 1, len(columns), width + 1), np.nan)
    shown = similarity[np.ix_(rows, columns)]
    mosaic[:, :height, :, :width] = shown.transpose(0, 2, 1, 3)
    mosaic = mosaic.reshape(len(rows) * (height + 1), -1)[:-1, :-1]
    return mosaic, float(min(0, shown.min())), rows, columns


def _filter_as_bytes(pattern):
    """A filter as an image, in which zero is grey."""
    return _as_bytes(127.5 + 127.5 * pattern / abs(pattern).max())


def _as_bytes(image):
    """An image of 0 to 255 in colour, without alpha."""
    image = image[..., :3] if image.shape[-1] >= 3 else np.repeat(image[..., :1], 3, axis=-1)
    return np.clip(np.round(image), 0, 255).astype("uint8")


def _show_at(axis, picture, top, left=0.0, width=1.0, **options):
    """Draws a picture of height one at a place of an axis: one axis is faster than many."""
    axis.imshow(picture, extent=(left, left + width, top + 1, top), **options)
    axis.set(xticks=[], yticks=[])
    axis.set_axis_off()


def _spread(size, count):
    """Indices of up to `count` of `size` things, evenly spread."""
    return np.unique(np.linspace(0, size - 1, min(size, count)).round().astype(int))
