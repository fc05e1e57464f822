import base64
import dataclasses
import io
import re
import warnings

import keras
import matplotlib.image
import matplotlib.text
import numpy as np
import pytest
from fontTools.ttLib import TTFont
from PIL import Image

from keras_vit import (
    VisionTransformer,
    attention_gradients,
    attention_relevance,
    attention_rollout,
    attention_scores,
    patch_weights,
)
from keras_vit.data import Dataset
from keras_vit.model import augmented_for_display
from keras_vit.reporting import drawing, explorer, figures, fonts, representations
from keras_vit.reporting.texts import load_texts

NAMES = [
    *("augmentation", "patches", "model", "history", "predictions", "confusion_matrix"),
    *("attention_rollout", "patch_filters", "position_similarity", "attention_distance"),
    "class_maps",
]
HISTORY = {
    "loss": [2.0, 1.5, 1.2],
    "accuracy": [0.2, 0.4, 0.5],
    "learning_rate": [3e-4, 3e-4, 3e-5],
    "seconds": [1.0, 1.0, 1.0],
}
VALIDATED = {**HISTORY, "val_loss": [2.1, 1.6, 1.4], "val_accuracy": [0.2, 0.3, 0.4]}


@pytest.fixture(scope="module")
def dataset():
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (24, 8, 12, 3), dtype="uint8")
    labels = np.arange(24) % 3
    return Dataset("noise", images, labels, images, labels, ["cat", "dog", "émeu"], True)


@pytest.fixture(scope="module")
def model():
    sizes = {"embed_dim": 16, "mlp_dim": 16, "num_heads": 2, "depth": 3}
    return VisionTransformer((8, 12, 3), 3, **sizes)


@pytest.fixture(scope="module")
def probabilities():
    random = np.random.default_rng(1)
    return random.dirichlet(np.ones(3), 24)


def is_drawn(path):
    """Whether a picture has a fair size and more than one colour."""
    picture = matplotlib.image.imread(path)
    height, width = picture.shape[:2]
    return 200 < height < 4000 and 200 < width < 4000 and picture.std() > 0.02


@pytest.mark.parametrize("pooling", ["token", pytest.param("mean", marks=pytest.mark.slow)])
def test_a_run_draws_eleven_pictures(tmp_path, model, dataset, probabilities, pooling):
    if pooling == "mean":
        model = VisionTransformer.from_config({**model.get_config(), "pooling": "mean"})
    figures.draw_all(model, dataset, probabilities, tmp_path, HISTORY, [2])
    expected = {f"{name}.png" for name in NAMES}
    assert {path.name for path in tmp_path.iterdir()} == expected
    assert all(is_drawn(path) for path in tmp_path.iterdir())


def test_every_picture_of_data_names_the_data_set(
    tmp_path, model, dataset, probabilities, monkeypatch
):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    figures.draw_all(model, dataset, probabilities, tmp_path, HISTORY, [2])
    assert [figure.get_suptitle() for figure in drawn] == ["noise"] * 10


def texts_of(drawn):
    """Lines of the texts in figures."""
    texts = {text.get_text() for figure in drawn for text in figure.findobj(matplotlib.text.Text)}
    return {line for text in texts for line in text.splitlines()}


def patterns(texts):
    """Regular expressions for texts in a dictionary, whose `{names}` stand for anything."""
    if isinstance(texts, str):
        return [".+".join(map(re.escape, re.split(r"\{.*?\}", texts)))]
    values = texts.values() if isinstance(texts, dict) else texts
    return [pattern for value in values for pattern in patterns(value)]


@pytest.mark.parametrize("language", [pytest.param("en", marks=pytest.mark.slow), "pl"])
def test_all_texts_in_pictures_are_of_the_language(
    tmp_path, model, dataset, probabilities, monkeypatch, language
):
    with monkeypatch.context() as patch:
        drawn = []
        patch.setattr(figures.plt, "close", drawn.append)
        figures.draw_all(model, dataset, probabilities, tmp_path, VALIDATED, [2], language)
        path, image = tmp_path / "more.png", np.zeros((16, 16, 3), "uint8")
        figures.draw_history(HISTORY, [], path, language=language)
        figures.draw_patches(image, 1, path, language=language)
        figures.draw_augmentation([], image[None], path, language=language)
        without = keras.Sequential([keras.layers.Dense(1)])
        representations.draw_position_similarity(without, path, language=language)
    found = texts_of(drawn)
    figures.plt.close("all")
    expected = patterns(load_texts(language)["figures"])
    unused = [
        pattern
        for pattern in expected
        if not any(re.fullmatch(f"(.* ← )?{pattern}", text) for text in found)
    ]
    assert unused == []
    # Numbers, classes with or without a probability, and the data set need no translation.
    digits = r"[−-]?\d+(\.\d+)?(e-\d+)?" if language == "en" else r"[−-]?\d+(,\d+)?(e-\d+)?"
    classes = rf"(✓ )?({'|'.join(dataset.class_names)})( \d+%)?"
    allowed = [*expected, digits, classes, rf"{classes} ← .+", "noise", ""]
    assert [text for text in found if not any(re.fullmatch(x, text) for x in allowed)] == []


def test_one_epoch_has_one_tick_and_its_learning_rate_is_a_plain_number(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    history = {"loss": [2.0], "accuracy": [0.2], "learning_rate": [1e-3]}
    figures.draw_history(history, [1], tmp_path / "history.png", language="pl")
    (figure,) = drawn
    rates = figure.axes[2]
    low, high = rates.get_ylim()
    ticks = zip(rates.get_yticks(), rates.get_yticklabels())
    labels = [label.get_text() for place, label in ticks if low <= place <= high]
    assert "0,001" in labels and not any("$" in label for label in labels)
    for axis in figure.axes:
        left, right = axis.get_xlim()
        assert [tick for tick in axis.get_xticks() if left <= tick <= right] == [1]


def test_overlays_show_the_map_and_the_image_be_it_dark_or_bright(tmp_path, model, monkeypatch):
    shown = []
    monkeypatch.setattr(figures, "_show", lambda axis, image: shown.append(image))
    noise = np.random.default_rng(2).integers(0, 50, (2, 8, 12, 3)).astype("uint8")
    images = noise + np.array([0, 205], "uint8")[:, None, None, None]
    figures.draw_attention_rollout(model, images, ["dark", "bright"], tmp_path / "rollout.png")
    weights = patch_weights(attention_rollout(attention_scores(model, images)))
    for image, overlay, of_image in zip(images.astype(float), shown[1::2], weights):

        def patch(pixels, token):
            return pixels.reshape(2, 4, 3, 4, 3)[token // 3, :, token % 3]

        most, least = of_image.argmax(), of_image.argmin()
        np.testing.assert_allclose(patch(overlay, most), patch(image, most), atol=1e-3)
        pale, grey = patch(overlay, least), patch(image, least).mean(axis=-1, keepdims=True)
        assert 60 < pale.min() < pale.max() < 196
        assert np.ptp(pale) == pytest.approx(np.ptp(grey) / 2, rel=1e-3)


@pytest.mark.parametrize("language", ["en", "pl"])
def test_long_class_names_neither_overlap_nor_shrink_the_images(
    tmp_path, dataset, probabilities, monkeypatch, language
):
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    long = ["automobile", "great spotted woodpecker", "a_class_that_nobody_should_have_called_so"]
    for names in (dataset.class_names, long):
        results = (dataset.test_labels, probabilities, names)
        path = tmp_path / "predictions.png"
        figures.draw_predictions(dataset.test_images, *results, path, language=language)
    short, figure = drawn
    renderer = figure.canvas.get_renderer()
    for before, axis in zip(short.axes, figure.axes, strict=True):
        assert axis.get_position().width == pytest.approx(before.get_position().width, rel=0.02)
    titles = [axis.title for axis in figure.axes if axis.get_title()]
    assert len(titles) > 12
    boxes = [title.get_window_extent(renderer) for title in titles]
    for index, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in boxes[:index])


def test_pictures_show_images_as_they_are_cut_into_patches(tmp_path, dataset, probabilities):
    layers = keras.layers.Rescaling(1 / 255), keras.layers.Resizing(12, 16)
    sizes = {"embed_dim": 16, "mlp_dim": 16, "num_heads": 2, "depth": 1}
    model = VisionTransformer((8, 12, 3), 3, augmentation=layers, **sizes)
    figures.draw_all(model, dataset, probabilities, tmp_path)
    assert len(list(tmp_path.iterdir())) == 10
    images = dataset.test_images[:2]
    page = explorer.pack(model, images, ["one", "two"])
    assert [page[key] for key in ("rows", "columns", "height", "width")] == [3, 4, 12, 16]
    content = base64.b64decode(page["images"][1]["source"].split(",")[1])
    shown = np.asarray(Image.open(io.BytesIO(content))).astype("float32")
    resized = keras.ops.convert_to_numpy(layers[1](images.astype("float32")))[1]
    np.testing.assert_allclose(shown, resized, atol=0.51)


def test_what_layers_do_to_the_range_of_pixels_is_undone_to_look_at_them(dataset):
    images = dataset.test_images[:4]
    layers = [
        keras.layers.Rescaling(-2.0, offset=9.0),
        keras.layers.Normalization(mean=[1.0, 2.0, 3.0], variance=[4.0, 5.0, 6.0]),
        keras.layers.CenterCrop(4, 6),
    ]
    np.testing.assert_allclose(
        augmented_for_display(layers, images), images[:, 2:6, 3:9], atol=1e-3
    )
    grey = keras.layers.Lambda(lambda x: 0 * x)
    assert not augmented_for_display([grey], images).any()


def test_of_very_many_patches_the_first_are_drawn(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype="uint8")
    figures.draw_patches(image, 1, tmp_path / "patches.png")
    assert is_drawn(tmp_path / "patches.png")


def test_drawing_leaves_the_model_as_it_was(tmp_path, model, dataset, probabilities):
    before = model.predict(dataset.test_images, verbose=0)
    figures.draw_all(model, dataset, probabilities, tmp_path, HISTORY, [2])
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert np.allclose(loaded.predict(dataset.test_images, verbose=0), before, atol=1e-6)


def test_the_graph_shows_one_block_open_and_folds_the_others(model):
    drawing = figures._folded(model)
    names = [layer.name for layer in drawing.layers]
    assert "blocks_2_to_3" in names and "block_1" in names
    assert "block_1_attention" in names and "block_2_attention" not in names
    dot = keras.utils.model_to_dot(drawing, show_shapes=True).to_string()
    assert "MultiHeadAttention" in dot and "(None, 7, 16)" in dot


def test_without_graphviz_the_graph_is_a_warning(tmp_path, model, monkeypatch, capsys):
    monkeypatch.setattr(figures.shutil, "which", lambda _: None)
    monkeypatch.setitem(__import__("sys").modules, "pygraphviz", None)
    figures.draw_model(model, tmp_path / "model.png")
    assert "WARNING" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_grey_images_and_validation_curves_are_drawn(tmp_path, dataset, probabilities):
    grey = {name: getattr(dataset, name)[..., :1] for name in ("train_images", "test_images")}
    dataset = dataclasses.replace(dataset, **grey)
    figures.draw_augmentation([], dataset.train_images, tmp_path / "augmentation.png")
    figures.draw_patches(dataset.test_images[0], 2, tmp_path / "patches.png")
    figures.draw_history(VALIDATED, [], tmp_path / "history.png")
    assert all(is_drawn(path) for path in tmp_path.iterdir())
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("right", [True, False])
def test_a_model_that_is_always_right_or_always_wrong_is_drawn(tmp_path, dataset, right):
    labels = dataset.test_labels
    certain = np.eye(3)[labels if right else (labels + 1) % 3]
    path = tmp_path / "predictions.png"
    figures.draw_predictions(dataset.test_images, labels, certain, dataset.class_names, path)
    assert is_drawn(path)


def test_what_speaks_for_a_class_is_drawn_from_its_relevance(tmp_path, dataset, monkeypatch):
    """An image of 2x4 patches, twice, with two classes, and no class token."""
    sizes = {"embed_dim": 16, "mlp_dim": 16, "num_heads": 2, "depth": 2, "pooling": "mean"}
    model = VisionTransformer((8, 16, 3), 3, augmentation=[], **sizes)
    images = np.repeat(np.random.default_rng(0).integers(0, 256, (1, 8, 16, 3)), 2, axis=0)
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    representations.draw_class_maps(model, images, [0, 2], ["cat", "émeu"], tmp_path / "maps.png")
    columns = [[x.get_array() for x in axis.images] for axis in drawn[0].axes]
    scores = attention_scores(model, images)
    relevance = attention_relevance(scores, attention_gradients(model, images, [0, 2]))
    expected = relevance.mean(axis=1).reshape(2, 2, 4)
    np.testing.assert_allclose(columns[3], expected, rtol=1e-4)
    np.testing.assert_array_equal(columns[0], images)
    np.testing.assert_array_equal(columns[1][0], columns[1][1])
    assert not np.allclose(*columns[2]) and not np.allclose(*columns[3])
    # Colour, in the patch that is most relevant, and none in the least relevant one.
    for overlay, values in zip(columns[4], expected):
        colour = np.ptp(overlay.astype(int), axis=-1).reshape(2, 4, 4, 4).mean(axis=(1, 3))
        assert colour.argmin() == values.argmin() and colour.min() == 0
        assert colour.flat[values.argmax()] > 50


def test_uniform_attention_lies_on_the_line_of_uniform_attention(tmp_path, monkeypatch):
    sizes = {"embed_dim": 16, "mlp_dim": 16, "num_heads": 2, "depth": 2}
    model = VisionTransformer((4, 12, 3), 3, augmentation=[], **sizes)
    for block in (1, 2):
        layer = model.get_layer(f"block_{block}_attention")
        layer.set_weights([np.zeros_like(weight) for weight in layer.get_weights()])
    drawn, images = [], np.zeros((3, 4, 12, 3))
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    representations.draw_attention_distance(model, images, tmp_path / "distance.png")
    (axis,) = drawn[0].axes
    uniform, mean = (line.get_ydata() for line in axis.lines)
    np.testing.assert_allclose([*uniform, *mean], 4 * 8 / 9)  # P (n * n - 1) / (3 n)
    points = np.concatenate([x.get_offsets() for x in axis.collections])
    np.testing.assert_allclose(points[:4], [(block, 32 / 9) for block in (1, 1, 2, 2)])


def test_of_very_many_patches_some_maps_of_positions_are_drawn(tmp_path, monkeypatch):
    model = VisionTransformer((4, 80, 3), 3, embed_dim=4, mlp_dim=4, num_heads=1, depth=1)
    drawn = []
    monkeypatch.setattr(figures.plt, "close", drawn.append)
    representations.draw_position_similarity(model, tmp_path / "positions.png")
    axis = drawn[0].axes[0]
    columns = [int(label.get_text()) for label in axis.get_xticklabels()]
    assert len(columns) == 12 and columns[0] == 1 and columns[-1] == 20
    (mosaic,) = (image.get_array() for image in axis.images)
    assert mosaic.shape == (1, 12 * 21 - 1)
    for number, column in enumerate(columns):  # Each position is most similar to itself.
        assert mosaic[0, 21 * number + column - 1] == pytest.approx(1, abs=1e-5)
        assert np.isclose(mosaic[0, 21 * number : 21 * number + 20], 1).sum() == 1


def test_letters_that_no_font_has_become_numbers_or_boxes_without_a_warning(tmp_path, monkeypatch):
    own = [x for x in fonts.font_manager.fontManager.ttflist if x.name == fonts.FAMILY]
    monkeypatch.setattr(fonts.font_manager.fontManager, "ttflist", own)
    names = ["żółw", "猫", "தமிழ்"]
    assert fonts.legible(names, "class") == ["żółw", "class 1", "class 2"]
    figure, axis = figures.plt.subplots()
    text = axis.set_title("a 猫\nb")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawing.save(figure, tmp_path / "x.png", "🐢 photos")
    assert text.get_text() == "a □\nb" and figure.get_suptitle() == "□ photos"


def test_letters_that_another_font_of_the_system_has_are_drawn_with_it():
    other = "STIXGeneral"  # It comes with Matplotlib as well.
    letters = [
        set(TTFont(fonts.font_manager.findfont(name)).getBestCmap())
        for name in (other, fonts.FAMILY)
    ]
    letter = chr(min(x for x in letters[0] - letters[1] if x > 0x2000 and not 0xE000 <= x < 0xF900))
    known = fonts.families(["a" + letter])
    assert known[0] == fonts.FAMILY and len(known) == 2 and fonts.legible([letter], "x") == [letter]


def test_examples_are_of_all_classes():
    labels = np.array([0, 0, 0, 0, 1, 1, 2])
    assert figures._one_per_class(labels, 3, 5).tolist() == [0, 4, 6, 1, 5]
    assert figures._one_per_class(labels, 3, 2).tolist() == [0, 4]


def test_the_most_frequent_confusions_are_shown_surest_first():
    labels = np.array([0, 0, 0, 0, 1, 2])
    predicted = np.array([1, 0, 1, 1, 2, 0])
    confidence = np.array([0.6, 0.99, 0.9, 0.7, 0.8, 0.95])
    probabilities = np.stack([(1 - confidence) / 2] * 3, axis=1)
    probabilities[np.arange(6), predicted] = confidence
    assert figures._worst_confusions(labels, probabilities, 2).tolist() == [2, 5]
    assert figures._worst_confusions(labels, probabilities, 4).tolist() == [2, 3, 5, 4]
    assert figures._worst_confusions(labels, probabilities, 9).tolist() == [2, 3, 0, 5, 4]


def test_a_text_beside_a_very_wide_image_and_an_image_with_alpha_are_drawn():
    assert drawing.fitted("a cat", 1.75 / 40, 10)[0] == "\n".join("acat")
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 4)).astype("uint8")
    np.testing.assert_array_equal(representations._as_bytes(pixels), pixels[..., :3])


def test_a_confusion_matrix_keeps_its_size_beside_long_names(tmp_path):
    labels = np.arange(3)
    for names in (["a", "b", "c"], [60 * letter for letter in "abc"]):
        path = tmp_path / f"{len(names[0])}.png"
        figures.draw_confusion_matrix(labels, np.eye(3), names, path)
    short, long = (matplotlib.image.imread(tmp_path / f"{size}.png") for size in (1, 60))
    filled = [
        np.all(abs(x[..., :3] - (0.03, 0.19, 0.42)) < 0.02, axis=-1).sum() for x in (short, long)
    ]
    assert filled[1] > filled[0] / 3
