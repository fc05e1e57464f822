"""Pictures of each stage of a run, enlarged without blur and legible without colour."""

import importlib.util
import pathlib
import shutil
import subprocess
import sys

import keras
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from keras_vit.attention import attention_rollout, attention_scores, patch_weights
from keras_vit.files import atomic_write
from keras_vit.layers import Patches
from keras_vit.messages import enumerated, warn
from keras_vit.model import augmented_for_display
from keras_vit.reporting import fonts, representations
from keras_vit.reporting.drawing import (
    BLUE,
    GREEN,
    GREY,
    ORANGE,
    STYLE,
    LocalizedTicks,
    fitted,
    save,
)
from keras_vit.reporting.texts import describe_prediction, load_texts, localize

SEED = 0
MAX_PATCHES = 128
MAX_LABELS = 20  # Most class names of a confusion matrix.


def draw_all(
    model, dataset, probabilities, folder, history=None, milestone_epochs=(), language="en"
):
    """Draws the eleven pictures of a run; without its training history, ten.

    Args:
        model: a trained `VisionTransformer`.
        dataset: the `Dataset` it was trained and tested on.
        probabilities: array `(N, num_classes)`, predicted for the test images.
        folder: `Path` of an existing folder.
        history: dictionary of lists, one value per epoch, from `training.fit`.
        milestone_epochs: epochs after which the learning rate drops.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    class_names, labels, images = dataset.class_names, dataset.test_labels, dataset.test_images
    drawn_names = fonts.legible(class_names, load_texts(language)["class"])
    numbered = [f"{new}: {old}" for old, new in zip(class_names, drawn_names) if new != old]
    if numbered:
        warn(
            "no font has the letters of all class names: the pictures number them "
            f"({enumerated(numbered)}). Install one, such as Noto Sans CJK"
        )
    class_names = drawn_names
    patch_size = model.get_layer("patches").patch_size
    examples = _one_per_class(labels, len(class_names), 6)
    common = {"source": dataset.name, "language": language}
    path = folder / "augmentation.png"
    trained = _one_per_class(dataset.train_labels, len(class_names), 5)
    draw_augmentation(model.augmentation, dataset.train_images[trained], path, **common)
    (image,) = augmented_for_display(model.augmentation, images[examples[:1]])
    draw_patches(image, patch_size, folder / "patches.png", **common)
    draw_model(model, folder / "model.png")
    if history:
        draw_history(history, milestone_epochs, folder / "history.png", **common)
    results = (labels, probabilities, class_names)
    draw_predictions(images, *results, folder / "predictions.png", **common)
    draw_confusion_matrix(*results, folder / "confusion_matrix.png", **common)
    predicted = probabilities[examples].argmax(axis=1)
    titles = [
        describe_prediction(class_names[label], class_names[prediction], language)
        for label, prediction in zip(labels[examples], predicted)
    ]
    path = folder / "attention_rollout.png"
    draw_attention_rollout(model, images[examples], titles, path, **common)

    representations.draw_all(model, images, probabilities, class_names, folder, **common)


def draw_augmentation(layers, images, path, source=None, count=5, draws=9, language="en"):
    """Images, each beside several random augmentations of it.

    Args:
        layers: list of augmentation layers.
        images: array `(N, H, W, C)`, of which the first `count` are shown.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        count: int, number of images.
        draws: int, number of augmentations of each.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["augmentation"]
    originals = np.asarray(images[:count])
    augmented = augmented_for_display(layers, np.repeat(originals, draws, axis=0), training=True)
    augmented = augmented.reshape(len(originals), draws, *augmented.shape[1:])
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(originals),
            draws + 1,
            figsize=(draws + 1, 0.98 * len(originals) + 0.5),
            squeeze=False,
        )
        for row, original, variants in zip(axes, originals, augmented):
            for axis, image in zip(row, [original, *variants]):
                _show(axis, image)
            _frame(row[0], BLUE, "solid")
        axes[0, 0].set_title(texts["original"], fontsize=10, color=BLUE, fontweight="bold")
        names = " → ".join(type(layer).__name__ for layer in layers)
        title = texts["augmented"].format(layers=names) if layers else texts["none"]
        axes[0, (draws + 1) // 2].set_title(title, fontsize=10)
        save(figure, path, source)


def draw_patches(image, patch_size, path, source=None, language="en"):
    """An image, its grid of patches, and the sequence of patches that the model reads.

    Args:
        image: array `(H, W, C)`.
        patch_size: int, side of a patch in pixels.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["patches"]
    height, width, channels = image.shape
    sequence = keras.ops.convert_to_numpy(Patches(patch_size)(image[None]))[0]
    patches = sequence.reshape(-1, patch_size, patch_size, channels)
    count, patches = len(patches), patches[:MAX_PATCHES]
    columns = min(len(patches), 16)
    rows = -(-len(patches) // columns)
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(10, 4.6 + 0.72 * rows))
        parts = figure.subfigures(2, 1, height_ratios=[4.6, 0.72 * rows], squeeze=False)
        top, bottom = parts.ravel()
        whole, cut = top.subplots(1, 2)
        _show(whole, image)
        whole.set_title(texts["image"].format(height=height, width=width))
        _show(cut, image)
        for x in range(0, width + 1, patch_size):
            cut.axvline(x - 0.5, color="white", linewidth=2)
        for y in range(0, height + 1, patch_size):
            cut.axhline(y - 0.5, color="white", linewidth=2)
        grid = {"rows": height // patch_size, "columns": width // patch_size}
        cut.set_title(texts["grid"].format(**grid, size=patch_size))
        title = texts["sequence" if len(patches) == count else "sequence_start"].format(
            count=localize(f"{count:,}", language),
            values=localize(f"{sequence.shape[1]:,}", language),
            shown=len(patches),
        )
        bottom.suptitle(title, fontsize=11)
        axes = bottom.subplots(rows, columns, squeeze=False).ravel()
        for position, (axis, patch) in enumerate(zip(axes, patches), start=1):
            _show(axis, patch)
            axis.set_xlabel(position, fontsize=8, labelpad=1)
        for axis in axes[len(patches) :]:
            axis.axis("off")
        save(figure, path, source)


def draw_model(model, path):
    """The computation graph with its blocks collapsed, and the first block expanded beside it.

    Graphviz's `dot` draws it if it is installed, else pygraphviz, whose wheels include Graphviz.
    If neither works, a warning is printed instead. Layer names are the same in every language.

    Args:
        model: a `VisionTransformer`.
        path: `Path` of the picture.
    """
    try:
        look = {"show_shapes": True, "show_layer_names": True, "dpi": 110}
        graph = keras.utils.model_to_dot(_folded(model), **look).to_string()
        with atomic_write(pathlib.Path(path)) as part:
            _run_graphviz(graph, part)
    except Exception as error:
        pathlib.Path(path).unlink(missing_ok=True)  # One of another model.
        warn(f"{path} was not drawn: {error}")


def _run_graphviz(graph, path):
    """Draws a graph in the DOT language, in a process whose remarks on fonts are not shown."""
    if dot := shutil.which("dot"):
        command = [dot, "-Tpng", "-o", str(path)]
    elif importlib.util.find_spec("pygraphviz"):
        source = "import pygraphviz, sys; g = pygraphviz.AGraph(sys.stdin.buffer.read().decode())"
        command = [sys.executable, "-c", f"{source}; g.draw(sys.argv[1], prog='dot')", str(path)]
    else:
        raise RuntimeError("it needs Graphviz, or `pip install pygraphviz`")
    result = subprocess.run(command, input=graph.encode(), capture_output=True)
    if result.returncode:
        lines = result.stderr.decode(errors="replace").strip().splitlines()
        raise RuntimeError(lines[-1] if lines else f"Graphviz ended with {result.returncode}")


def draw_history(history, milestone_epochs, path, source=None, language="en"):
    """Loss, accuracy and learning rate by epoch, with the milestones of the learning rate.

    Args:
        history: dictionary of lists, one value per epoch.
        milestone_epochs: epochs after which the learning rate drops; empty for a schedule that
            changes it at each step.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["history"]
    epochs = np.arange(1, len(history["loss"]) + 1)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(1, 3, figsize=(12, 3.6))
        for axis, metric in zip(axes, ("loss", "accuracy")):
            scale = 100 if metric == "accuracy" else 1
            series = {"training": (metric, BLUE, "o-")}
            series["validation"] = (f"val_{metric}", ORANGE, "s--")
            for name, (column, colour, line) in series.items():
                if column in history:
                    values = scale * np.asarray(history[column])
                    axis.plot(epochs, values, line, color=colour, label=texts[name], markersize=4)
            axis.set_title(texts[metric])
            axis.yaxis.set_major_formatter(LocalizedTicks(language))
            axis.legend()
        rates, style = history["learning_rate"], {"color": GREEN, "markersize": 4}
        if milestone_epochs:
            axes[2].step(epochs, rates, "o-", where="mid", **style)
            axes[2].set_yscale("log")
            axes[2].yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            plain = FuncFormatter(lambda rate, _: localize(f"{rate:g}", language))
            axes[2].yaxis.set_major_formatter(plain)
            axes[2].yaxis.set_minor_formatter(NullFormatter())
            axes[2].set_title(texts["learning_rate"])
        else:  # It ends at zero; the history holds its value at the end of each epoch.
            axes[2].plot(epochs, rates, "o-", **style)
            axes[2].yaxis.set_major_formatter(LocalizedTicks(language))
            axes[2].set_title(texts["learning_rate_after_epoch"])
        for axis in axes:
            axis.set_xlabel(texts["epoch"])
            axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
            axis.grid(alpha=0.25)
            for epoch in milestone_epochs:
                # The rate drops between this epoch and the next one.
                axis.axvline(epoch + 0.5, color=GREY, linestyle=":", linewidth=1.5)
        if milestone_epochs:
            axes[2].plot([], [], ":", color=GREY, label=texts["milestone"])
            axes[2].legend()
        save(figure, path, source)


def draw_predictions(
    images, labels, probabilities, class_names, path, source=None, columns=6, language="en"
):
    """Correctly and wrongly classified test images, with their three most likely classes.

    The correct ones are drawn at random. The wrong ones are of the most frequent confusions of one
    class with another, and of each confusion those that the model is surest of.

    Args:
        images: array `(N, H, W, C)`.
        labels: integer array `(N,)`, the true classes.
        probabilities: array `(N, num_classes)`.
        class_names: list of strings.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        columns: int, images in a row; there are two rows of correct and two of wrong predictions.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["predictions"]
    class_names = fonts.legible(class_names, load_texts(language)["class"])
    predicted = probabilities.argmax(axis=1)
    random = np.random.default_rng(SEED)
    groups = {
        "correct": (np.flatnonzero(predicted == labels), BLUE, "solid"),
        "wrong": (np.flatnonzero(predicted != labels), ORANGE, "dashed"),
    }
    with plt.rc_context(STYLE):
        figure = plt.figure(figsize=(2 * columns, 13))
        parts = figure.subfigures(2, 1, hspace=0.02, squeeze=False).ravel()
        for part, (group, (indices, colour, line)) in zip(parts, groups.items()):
            if group == "correct":
                chosen = random.permutation(indices)[: 2 * columns]
            else:
                chosen = _worst_confusions(labels, probabilities, 2 * columns)
            title = texts[group].format(
                count=localize(f"{len(indices):,}", language),
                total=localize(f"{len(labels):,}", language),
                shown=len(chosen),
            )
            part.suptitle(title, fontweight="bold")
            axes = part.subplots(4, columns, height_ratios=[3, 1, 3, 1])
            pictures, bars = axes[::2].ravel(), axes[1::2].ravel()
            for axis in axes.ravel():
                axis.axis("off")
            for picture, bar, index in zip(pictures, bars, chosen):
                picture.axis("on")
                _show(picture, images[index])
                _frame(picture, colour, line)
                title = describe_prediction(
                    class_names[labels[index]], class_names[predicted[index]], language
                )
                title, size = fitted(title, 1.95, 11)
                picture.set_title(title, fontsize=size)
                _draw_top_classes(
                    bar, labels[index], probabilities[index], class_names, texts["true"]
                )
        save(figure, path, source)


def draw_confusion_matrix(labels, probabilities, class_names, path, source=None, language="en"):
    """How often each class is predicted, in percent of the images of each true class.

    Args:
        labels: integer array `(N,)`, the true classes.
        probabilities: array `(N, num_classes)`.
        class_names: list of strings.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    from sklearn.metrics import ConfusionMatrixDisplay

    texts = load_texts(language)["figures"]["confusion_matrix"]
    class_names = fonts.legible(class_names, load_texts(language)["class"])
    count = len(class_names)
    legible = count <= MAX_LABELS
    shown = [fitted(name, 1.6, 10) for name in class_names]
    with plt.rc_context({**STYLE, "axes.spines.top": True, "axes.spines.right": True}):
        side = 2.5 + 0.6 * min(count, MAX_LABELS)
        figure, axis = plt.subplots(figsize=(side + 0.3, side))
        display = ConfusionMatrixDisplay.from_predictions(
            labels,
            probabilities.argmax(axis=1),
            labels=np.arange(count),
            display_labels=[name for name, _ in shown] if legible else None,
            normalize="true",
            include_values=False,
            colorbar=False,
            cmap="Blues",
            ax=axis,
            xticks_rotation=45 if legible else "vertical",
            im_kw={"vmin": 0, "vmax": 1},
        )
        if legible:
            labels_of_axes = [*axis.get_xticklabels(), *axis.get_yticklabels()]
            plt.setp(labels_of_axes, fontsize=min(size for _, size in shown))
            plt.setp(axis.get_xticklabels(), ha="right", rotation_mode="anchor")
            for (row, column), rate in np.ndenumerate(np.nan_to_num(display.confusion_matrix)):
                if round(100 * rate) > 0:
                    colour = "white" if rate > 0.5 else "black"
                    axis.text(
                        column, row, f"{100 * rate:.0f}", ha="center", va="center", color=colour
                    )
        else:
            some = np.arange(0, count, -(-count // 50))
            axis.set_xticks(some, some)
            axis.set_yticks(some, some)
            percent = FuncFormatter(lambda rate, _: f"{100 * rate:.0f}")
            bar = figure.colorbar(display.im_, ax=axis, shrink=0.6, format=percent)
            bar.outline.set_visible(False)
        accuracy = np.mean(probabilities.argmax(axis=1) == labels)
        title = texts["title"].format(accuracy=localize(f"{accuracy:.2%}", language))
        title, size = fitted(title, side, 12)
        axis.set_title(title, fontsize=size, loc="right")  # On the left, names leave it room.
        axis.set_xlabel(texts["predicted"])
        axis.set_ylabel(texts["true"])
        save(figure, path, source)


def draw_attention_rollout(model, images, titles, path, source=None, language="en"):
    """Attention Rollout of each image: its map, an overlay, and how it changes with depth.

    The overlay is on the image as the model splits it into patches, after resizing or cropping.
    Patches of the largest weight keep their colours, others turn to grey of low contrast.

    Args:
        model: a `VisionTransformer`.
        images: array `(B, H, W, C)` of raw pixels.
        titles: list of strings, one per image.
        path: `Path` of the picture.
        source: string, name of the data set, written at the top.
        language: `"en"` or `"pl"`, that of titles, labels and legends.
    """
    texts = load_texts(language)["figures"]["attention_rollout"]
    scores = attention_scores(model, images)
    depth, patch_size = scores.shape[1], model.get_layer("patches").patch_size
    model_inputs = augmented_for_display(model.augmentation, images)
    rows, columns = (size // patch_size for size in model_inputs.shape[1:3])
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
        for row, image, model_input, title, by_depth in zip(
            axes, images, model_inputs, titles, maps
        ):
            final = by_depth[-1]
            _show(row[0], image)
            title, size = fitted(title, 1.35, 8.5)
            row[0].set_ylabel(title, fontsize=size)
            _show_map(row[1], final)
            strength = (final - final.min()) / np.ptp(final).clip(1e-12)
            enlarged = np.kron(strength, np.ones((patch_size, patch_size)))[..., None]
            # Towards grey of low contrast: towards black or white, dark or bright images get lost.
            pale = 64 + 0.5 * model_input[..., :3].mean(axis=-1, keepdims=True)
            _show(row[2], pale + enlarged * (model_input - pale))
            for axis, block in zip(row[3:], shown):
                _show_map(axis, by_depth[block])
        depths = (
            texts["up_to_block"].format(block=block + 1) if block else texts["first_block"]
            for block in shown
        )
        headings = [texts["image"], texts["rollout"], texts["overlay"], *depths]
        for axis, heading in zip(axes[0], headings):
            axis.set_title(heading, fontsize=10)
        figure.supxlabel(texts["scale"], fontsize=9)
        save(figure, path, source)


def _folded(model):
    """A model to draw: the first block as one node, the rest as another, and the first expanded."""
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
    """Indices of up to `count` images: the first ones of each class, then the second ones, ..."""
    rank = np.zeros(len(labels), int)
    for number in range(classes):
        rank[labels == number] = np.arange(np.count_nonzero(labels == number))
    return np.lexsort((labels, rank))[:count]


def _worst_confusions(labels, probabilities, count):
    """Indices of up to `count` wrong predictions, the most frequent confusions first.

    A confusion is a pair of a true and a predicted class. As many confusions as possible are
    shown, each with those images that the model is surest of.
    """
    predicted, confidence = probabilities.argmax(axis=1), probabilities.max(axis=1)
    groups = {}
    for index in sorted(np.flatnonzero(predicted != labels), key=lambda i: -confidence[i]):
        groups.setdefault((labels[index], predicted[index]), []).append(index)
    groups = sorted(groups.values(), key=len, reverse=True)
    # The first of each confusion, then the second, ...; then by confusion again.
    places = sorted((rank, place) for place, x in enumerate(groups) for rank in range(len(x)))
    chosen = sorted((place, rank) for rank, place in places[:count])
    return np.array([groups[place][rank] for place, rank in chosen], int)


def _draw_top_classes(axis, label, probabilities, class_names, mark):
    """Bars of the three largest probabilities; an arrow and the mark point at the true class."""
    top = probabilities.argsort()[::-1][:3]
    colours = ["#80C4EE" if index == label else "#CCCCCC" for index in top]
    axis.axis("off")
    axis.barh(range(len(top)), probabilities[top], color=colours)
    axis.set(xlim=(0, 1), ylim=(2.6, -0.6))
    for y, index in enumerate(top):
        text = f"{class_names[index]} {probabilities[index]:.0%}"
        text += f" ← {mark}" if index == label else ""
        text, size = fitted(text, 1.85, 8, smallest=1)
        # A long text must not make the layout shrink the images.
        axis.text(0.02, y, text, va="center", fontsize=size, in_layout=False)


def _show(axis, image):
    """An image of 0 to 255, in colour or grey."""
    image = np.clip(np.round(image), 0, 255).astype("uint8")
    image = image[..., :3] if image.shape[-1] >= 3 else image[..., 0]
    axis.imshow(image, cmap="gray", vmin=0, vmax=255)
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
