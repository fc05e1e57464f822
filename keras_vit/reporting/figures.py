"""Pictures of everything that a run did, enlarged without blur and legible without colour."""

import pathlib
import shutil
import sys
import typing

import keras
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from keras_vit.attention import attention_rollout, attention_scores, patch_weights
from keras_vit.files import atomic_write
from keras_vit.layers import Patches
from keras_vit.model import augmented_for_display

# Okabe and Ito's colours, told apart by every kind of colour vision.
BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#777777"
STYLE: dict[typing.Any, typing.Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 11,
    "figure.constrained_layout.use": True,
    "figure.facecolor": "white",
    "image.interpolation": "nearest",
    "legend.frameon": False,
    "savefig.dpi": 150,
    "text.parse_math": False,  # A class may be called `$`.
}
SEED = 0
MOST_PATCHES = 128


def draw_all(model, dataset, probabilities, folder, history=None, falls=()):
    """Draws the seven pictures of a run; without a history of its training, six.

    Args:
        model: a trained `VisionTransformer`.
        dataset: the `Dataset` it was trained and tested on.
        probabilities: array `(N, num_classes)`, the model's answer for each test image.
        folder: `Path` of an existing folder.
        history: dictionary of lists, one value per epoch, from `training.fit`.
        falls: epochs at which the learning rate falls.
    """
    names, labels = dataset.class_names, dataset.test_labels
    patch_size = model.get_layer("patches").patch_size
    examples = _one_per_class(labels, len(names), 6)
    images, of = dataset.test_images, {"source": dataset.name}
    draw_augmentation(model.augmentation, dataset.train_images, folder / "augmentation.png", **of)
    (cut,) = augmented_for_display(model.augmentation, images[examples[:1]])
    draw_patches(cut, patch_size, folder / "patches.png", **of)
    draw_model(model, folder / "model.png")
    if history:
        draw_history(history, falls, folder / "history.png", **of)
    draw_predictions(images, labels, probabilities, names, folder / "predictions.png", **of)
    draw_confusion_matrix(labels, probabilities, names, folder / "confusion_matrix.png", **of)
    verdicts = [_verdict(labels[i], probabilities[i], names) for i in examples]
    path = folder / "attention_rollout.png"
    draw_attention_rollout(model, images[examples], verdicts, path, **of)


def draw_augmentation(layers, images, path, source=None, count=5, draws=9):
    """Images beside several random draws of the layers that vary them.

    Args:
        layers: list of augmentation layers.
        images: array `(N, H, W, C)`, of which the first `count` are shown.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        count: int, number of images.
        draws: int, number of draws of each.
    """
    originals = np.asarray(images[:count])
    varied = augmented_for_display(layers, np.repeat(originals, draws, axis=0), training=True)
    result = varied.reshape(len(originals), draws, *varied.shape[1:])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(originals),
            draws + 1,
            figsize=(draws + 1, 0.98 * len(originals) + 0.5),
            squeeze=False,
        )
        for row, original, variants in zip(axes, originals, result):
            for axis, image in zip(row, [original, *variants]):
                _show(axis, image)
            _frame(row[0], BLUE, "solid")
        axes[0, 0].set_title("original", fontsize=10, color=BLUE, fontweight="bold")
        steps = " → ".join(type(layer).__name__ for layer in layers) or "none"
        axes[0, (draws + 1) // 2].set_title(f"draws of the augmentation: {steps}", fontsize=10)
        _save(figure, path, source)


def draw_patches(image, patch_size, path, source=None):
    """An image, the grid it is cut by, and the sequence of patches that the model reads.

    Args:
        image: array `(H, W, C)`.
        patch_size: int, side of a patch in pixels.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
    """
    height, width, channels = image.shape
    sequence = keras.ops.convert_to_numpy(Patches(patch_size)(image[None]))[0]
    patches = sequence.reshape(-1, patch_size, patch_size, channels)
    total, patches = len(patches), patches[:MOST_PATCHES]
    columns = min(len(patches), 16)
    rows = -(-len(patches) // columns)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 4.6 + 0.72 * rows))
        parts = figure.subfigures(2, 1, height_ratios=[4.6, 0.72 * rows], squeeze=False)
        top, bottom = parts.ravel()
        whole, cut = top.subplots(1, 2)
        _show(whole, image)
        whole.set_title(f"image, {height}×{width} pixels")
        _show(cut, image)
        for x in range(0, width + 1, patch_size):
            cut.axvline(x - 0.5, color="white", linewidth=2)
        for y in range(0, height + 1, patch_size):
            cut.axhline(y - 0.5, color="white", linewidth=2)
        cut.set_title(
            f"{height // patch_size}×{width // patch_size} patches of {patch_size}×{patch_size}"
        )
        shown = "" if len(patches) == total else f", the first {len(patches)} of them shown"
        bottom.suptitle(
            f"sequence of {total:,} patches, {sequence.shape[1]} numbers each{shown}", fontsize=11
        )
        axes = bottom.subplots(rows, columns, squeeze=False).ravel()
        for number, (axis, patch) in enumerate(zip(axes, patches), start=1):
            _show(axis, patch)
            axis.set_xlabel(number, fontsize=8, labelpad=1)
        for axis in axes[len(patches) :]:
            axis.axis("off")
        _save(figure, path, source)


def draw_model(model, path):
    """The computation graph: the whole with its blocks folded, and beside it the first block open.

    Drawn by `keras.utils.plot_model` where Graphviz's `dot` is installed, else by pygraphviz,
    which carries Graphviz's libraries. Where neither works, a warning takes the picture's place.

    Args:
        model: a `VisionTransformer`.
        path: `Path` of the picture.
    """
    try:
        drawing = _folded(model)
        look = {"show_shapes": True, "show_layer_names": True, "dpi": 110}
        with atomic_write(pathlib.Path(path)) as part:
            if shutil.which("dot"):
                keras.utils.plot_model(drawing, part, **look)
            else:
                import pygraphviz

                dot = keras.utils.model_to_dot(drawing, **look)
                pygraphviz.AGraph(dot.to_string()).draw(str(part), prog="dot")
    except Exception as error:
        pathlib.Path(path).unlink(missing_ok=True)  # Of another model.
        print(f"WARNING: {path} was not drawn: {error}", file=sys.stderr)


def draw_history(history, falls, path, source=None):
    """Loss, accuracy and learning rate over the epochs, with the milestones of the rate.

    Args:
        history: dictionary of lists, one value per epoch.
        falls: epochs after which the learning rate falls; empty if it falls with each step.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
    """
    epochs = np.arange(1, len(history["loss"]) + 1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
        for axis, key, label in zip(axes, ("loss", "accuracy"), ("loss", "accuracy, %")):
            scale = 100 if key == "accuracy" else 1
            series = {"training": (key, BLUE, "o-"), "validation": (f"val_{key}", ORANGE, "s--")}
            for name, (column, colour, line) in series.items():
                if column in history:
                    values = scale * np.asarray(history[column])
                    axis.plot(epochs, values, line, color=colour, label=name, markersize=4)
            axis.set_title(label)
            axis.legend()
        rates, style = history["learning_rate"], {"color": GREEN, "markersize": 4}
        if falls:
            axes[2].step(epochs, rates, "o-", where="mid", **style)
            axes[2].set_yscale("log")
            axes[2].set_title("learning rate")
        else:  # It ends at zero, and was written down after each epoch.
            axes[2].plot(epochs, rates, "o-", **style)
            axes[2].set_title("learning rate after the epoch")
        for axis in axes:
            axis.set_xlabel("epoch")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.grid(alpha=0.25)
            for fall in falls:
                # The rate falls between the epoch before and the next one.
                axis.axvline(fall + 0.5, color=GREY, linestyle=":", linewidth=1.5)
        if falls:
            axes[2].plot([], [], ":", color=GREY, label="milestone")
            axes[2].legend()
        _save(figure, path, source)


def draw_predictions(images, labels, probabilities, class_names, path, source=None, columns=6):
    """Test images that the model got right and wrong, with its three likeliest classes.

    Args:
        images: array `(N, H, W, C)`.
        labels: integer array `(N,)`, the true classes.
        probabilities: array `(N, num_classes)`.
        class_names: list of strings.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        columns: int, images of each kind in a row; there are two rows of each.
    """
    right = probabilities.argmax(axis=1) == labels
    random = np.random.default_rng(SEED)
    kinds = {"right": np.flatnonzero(right), "wrong": np.flatnonzero(~right)}
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(2 * columns, 13))
        parts = figure.subfigures(2, 1, hspace=0.02, squeeze=False).ravel()
        for part, (kind, indices) in zip(parts, kinds.items()):
            chosen = random.permutation(indices)[: 2 * columns]
            part.suptitle(
                f"{kind}: {len(indices):,} of {len(labels):,} test images, "
                f"{len(chosen)} of them at random",
                fontweight="bold",
            )
            axes = part.subplots(4, columns, height_ratios=[3, 1, 3, 1])
            pictures, bars = axes[::2].ravel(), axes[1::2].ravel()
            for axis in axes.ravel():
                axis.axis("off")
            for picture, bar, index in zip(pictures, bars, chosen):
                picture.axis("on")
                _show(picture, images[index])
                _frame(
                    picture,
                    BLUE if kind == "right" else ORANGE,
                    "solid" if kind == "right" else "dashed",
                )
                picture.set_title(_verdict(labels[index], probabilities[index], class_names))
                _draw_likeliest(bar, labels[index], probabilities[index], class_names)
        _save(figure, path, source)


def draw_confusion_matrix(labels, probabilities, class_names, path, source=None):
    """How often each class is taken for each other, in percent of the true class.

    Args:
        labels: integer array `(N,)`, the true classes.
        probabilities: array `(N, num_classes)`.
        class_names: list of strings.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
    """
    from sklearn.metrics import ConfusionMatrixDisplay

    count = len(class_names)
    legible = count <= 20
    with plt.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        side = 2.5 + 0.6 * min(count, 20)
        figure, axis = plt.subplots(figsize=(side + 0.3, side))
        display = ConfusionMatrixDisplay.from_predictions(
            labels,
            probabilities.argmax(axis=1),
            labels=np.arange(count),
            display_labels=class_names if legible else None,
            normalize="true",
            include_values=False,
            colorbar=False,
            cmap="Blues",
            ax=axis,
            xticks_rotation=45 if legible else "vertical",
            im_kw={"vmin": 0, "vmax": 1},
        )
        if legible:
            for (row, column), share in np.ndenumerate(np.nan_to_num(display.confusion_matrix)):
                if round(100 * share) > 0:
                    colour = "white" if share > 0.5 else "black"
                    axis.text(
                        column, row, f"{100 * share:.0f}", ha="center", va="center", color=colour
                    )
        accuracy = np.mean(probabilities.argmax(axis=1) == labels)
        axis.set_title(f"percent of each true class; accuracy {accuracy:.2%}")
        axis.set_xlabel("predicted class")
        axis.set_ylabel("true class")
        _save(figure, path, source)


def draw_attention_rollout(model, images, titles, path, source=None):
    """Where what the head reads comes from: map, overlay, and growth with depth.

    The overlay is on the image as it is cut into patches, resized or cropped by then.

    Args:
        model: a `VisionTransformer`.
        images: array `(B, H, W, C)` of raw pixels.
        titles: list of strings, one per image.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
    """
    scores = attention_scores(model, images)
    depth, side = scores.shape[1], model.get_layer("patches").patch_size
    cut = augmented_for_display(model.augmentation, images)
    rows, columns = cut.shape[1] // side, cut.shape[2] // side
    class_token = model.pooling == "token"
    rollouts = (attention_rollout(scores[:, :block]) for block in range(1, depth + 1))
    maps = [patch_weights(rollout, class_token) for rollout in rollouts]
    maps = np.stack(maps, axis=1).reshape(len(images), depth, rows, columns)
    shown = np.unique(np.linspace(0, depth - 1, min(depth, 6)).round().astype(int))
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(images),
            3 + len(shown),
            figsize=(1.35 * (3 + len(shown)), 1.4 * len(images) + 0.5),
            squeeze=False,
        )
        for row, image, patched, title, growth in zip(axes, images, cut, titles, maps):
            final = growth[-1]
            _show(row[0], image)
            row[0].set_ylabel(title, fontsize=8.5)
            _show_map(row[1], final)
            brightness = (final - final.min()) / np.ptp(final).clip(1e-12)
            enlarged = np.kron(brightness, np.ones((side, side)))[..., None]
            _show(row[2], patched * (0.25 + 0.75 * enlarged))
            for axis, block in zip(row[3:], shown):
                _show_map(axis, growth[block])
        headings = ["image", "rollout", "overlay", *(f"block {block + 1}" for block in shown)]
        for axis, heading in zip(axes[0], headings):
            axis.set_title(heading, fontsize=10)
        axes[0, 3].set_title(f"up to block {shown[0] + 1}", fontsize=10)
        figure.supxlabel("each map from its smallest weight (dark) to its largest", fontsize=9)
        _save(figure, path, source)


def _folded(model):
    """A model to draw: all blocks but the first in one node, and the first one open beside it."""
    # Rewiring must not touch the original.
    model = type(model).from_config({**model.get_config(), "augmentation": model.augmentation})
    depth = sum(isinstance(x, keras.layers.MultiHeadAttention) for x in model.layers)
    ends = [model.get_layer(f"block_{block}_mlp_sum").output for block in (1, depth)]
    before = model.get_layer("dropout").output
    first = keras.Model(before, ends[0], name="block_1")
    x = first(before)
    if depth > 1:
        name = f"blocks_2_to_{depth}" if depth > 2 else "block_2"
        x = keras.Model(*ends, name=name)(x)
    x = model.get_layer("norm")(x)
    x = x[:, 0] if model.pooling == "token" else model.get_layer("mean_of_patches")(x)
    logits = model.get_layer("head")(x)
    tokens = keras.Input(before.shape[1:], name="into_block_1")
    opened = keras.models.clone_model(first, input_tensors=tokens)
    return keras.Model([model.input, opened.input], [logits, opened.output])


def _one_per_class(labels, classes, count):
    """Indices of up to `count` images, each of another class where there are enough classes."""
    firsts = [np.flatnonzero(labels == number)[:1] for number in range(classes)]
    chosen = np.concatenate(firsts)[:count]
    return chosen if len(chosen) == count else np.arange(min(count, len(labels)))


def _verdict(label, probabilities, class_names):
    """True and predicted class in one or two lines."""
    predicted = probabilities.argmax()
    if predicted == label:
        return f"✓ {class_names[label]}"
    return f"✗ {class_names[predicted]}\nis {class_names[label]}"


def _draw_likeliest(axis, label, probabilities, class_names):
    """Bars of the three largest probabilities, the true class marked."""
    likeliest = probabilities.argsort()[::-1][:3]
    colours = ["#80C4EE" if number == label else "#CCCCCC" for number in likeliest]
    axis.axis("off")
    axis.barh(range(len(likeliest)), probabilities[likeliest], color=colours)
    axis.set(xlim=(0, 1), ylim=(2.6, -0.6))
    for y, number in enumerate(likeliest):
        mark = " ← true" if number == label else ""
        text = f"{class_names[number]} {probabilities[number]:.0%}{mark}"
        axis.text(0.02, y, text, va="center", fontsize=8)


def _show(axis, image):
    """An image of 0 to 255, in colour or grey."""
    image = np.clip(np.round(image), 0, 255).astype("uint8")
    axis.imshow(image if image.shape[-1] == 3 else image[..., 0], cmap="gray", vmin=0, vmax=255)
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _show_map(axis, values):
    axis.imshow(values, cmap="viridis")
    axis.set(xticks=[], yticks=[])
    for spine in axis.spines.values():
        spine.set_visible(False)


def _frame(axis, colour, line):
    axis.add_patch(
        Rectangle(
            (0, 0),
            1,
            1,
            transform=axis.transAxes,
            fill=False,
            edgecolor=colour,
            linestyle=line,
            linewidth=4,
        )
    )


def _save(figure, path, source):
    if source is not None:
        figure.suptitle(source, x=0.995, ha="right", fontsize=9, color=GREY)
    with atomic_write(pathlib.Path(path)) as part:
        figure.savefig(part)
    plt.close(figure)
