"""The page that runs a model: its arithmetic beside Keras and Pillow, and what a visitor sees."""

import base64
import io
import re

import keras
import numpy as np
import pytest
from PIL import Image, ImageOps

from keras_vit import (
    VisionTransformer,
    attention_distance,
    attention_rollout,
    attention_scores,
    patch_filters,
    patch_weights,
)
from keras_vit.data import read_image
from keras_vit.prediction import predict
from keras_vit.reporting import page as pages
from keras_vit.reporting.report import write_page

NAMES = ["ant", "bee </script>", "cat"]
SMALL = {
    **{"image_shape": (8, 12, 3), "num_classes": 3, "patch_size": 4, "embed_dim": 8, "mlp_dim": 10},
    **{"num_heads": 2, "depth": 3, "augmentation": [], "class_names": NAMES},
}
OTHERS = [
    SMALL,
    # Neither rows nor columns of any matrix are a multiple of four.
    {**SMALL, "pooling": "mean", "image_shape": (6, 9, 1), "patch_size": 3, "embed_dim": 6},
    {**SMALL, "image_shape": (4, 4, 3), "num_classes": 1, "depth": 1, "class_names": None},
]


def made(settings):
    """A model that attends sharply, and four images."""
    keras.utils.set_random_seed(1)
    model = VisionTransformer(**settings)
    model.set_weights([2 * weight for weight in model.get_weights()])
    images = np.random.default_rng(0).integers(0, 256, (4, *settings["image_shape"]))
    model.adapt(images)
    return model, images.astype("uint8")


@pytest.fixture(scope="module")
def small():
    return made(SMALL)


@pytest.fixture(scope="module")
def path(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    model, images = small
    assert write_page(path, model, images, ["ant", "ant", "cat", "bee"]) == 4
    return path


def answered(page):
    page.locator("main:not(.waiting)[aria-busy=false]").wait_for()
    return page


def classes(page):
    """The classes and probabilities that a page shows."""
    rows = page.locator("#classes li").all_inner_texts()
    return {name: float(value.rstrip("\u00a0%")) / 100 for name, value in map(str.splitlines, rows)}


def ran(page, model, images):
    """Logits and attention scores of a model, as a page computes them."""
    packed = pages.pack(model)
    results = page.evaluate(
        """([model, images]) => {
          const run = visionTransformer(model);
          return images.map((image) => Object.values(run(image)).map((values) => [...values]));
        }""",
        [packed, [image.ravel().tolist() for image in images]],
    )
    logits, scores = (np.array(values) for values in zip(*results))
    sizes = packed["sizes"]
    return logits, scores.reshape(-1, sizes["blocks"], sizes["heads"], *2 * [sizes["tokens"]])


def test_logits_attention_and_rollout_are_those_of_keras(path, open_page):
    page = open_page(path, reduced_motion="reduce")
    for settings in OTHERS:
        model, images = made(settings)
        logits, scores = ran(page, model, images)
        expected = attention_scores(model, images)
        np.testing.assert_allclose(logits, model.predict(images, verbose=0), atol=1e-3)
        np.testing.assert_allclose(scores, expected, atol=1e-3)
        class_token = model.pooling == "token"
        for block in range(1, settings["depth"] + 1):
            state = {"block": block, "view": "rollout", "query": 0, "head": "mean"}
            found = page.evaluate(
                """([sizes, scores, state]) =>
                  [...attentionMaps(sizes, (block, head, i) => scores[block][head][i])(state)]""",
                [
                    pages.pack(model)["sizes"],
                    expected[0].tolist(),
                    {**state, "residual": True, "discard": 0},
                ],
            )
            rollout = attention_rollout(expected[:1, :block], class_token=class_token)
            np.testing.assert_allclose(found[1:], patch_weights(rollout, class_token)[0], atol=1e-6)


def resized(page, image, size, channels, factor=1, strips=1, resize="squash"):
    """An image `(H, W, 3)` as the page resizes it when its rows come in so many strips."""
    height, width = image.shape[:2]
    rgba = np.concatenate([image, np.full((height, width, 1), 255, "uint8")], axis=-1)
    done, pixels = page.evaluate(
        """([sizes, picture, strips]) => {
          const reading = resizer(sizes, picture);
          const done = strips.map((rows) => reading.add(rows));
          return [done, [...reading.pixels()]];
        }""",
        [
            {"height": size[0], "width": size[1], "channels": channels, "resize": resize},
            {"height": height, "width": width, "factor": factor},
            [rows.ravel().tolist() for rows in np.array_split(rgba, strips)],
        ],
    )
    assert done == [False] * (strips - 1) + [True]
    return np.array(pixels).reshape(*size, channels)


def test_pictures_are_resized_as_by_predict(path, open_page, tmp_path):
    page = open_page(path, reduced_motion="reduce")
    random = np.random.default_rng(0)
    for shape, size, channels in [
        ((37, 50), (8, 12), 3),
        ((5, 3), (8, 12), 1),
        ((8, 12), (8, 12), 3),
        ((90, 7), (16, 16), 1),
    ]:
        image = random.integers(0, 256, (*shape, 3)).astype("uint8")
        Image.fromarray(image).save(tmp_path / "image.png")
        expected = read_image(tmp_path / "image.png", size, channels).astype(int)
        # Some versions of Pillow filter the columns of tall images first: rounding differs.
        found = resized(page, image, size, channels, strips=2)
        assert np.abs(found - expected).max() <= (image.shape[0] > 2 * image.shape[1])
    # What a JPEG loses by being decoded at a smaller size is nearly an average of its pixels.
    smooth = Image.fromarray(random.integers(0, 256, (8, 8, 3)).astype("uint8"))
    smooth.resize((130, 97), Image.Resampling.BICUBIC).save(tmp_path / "image.jpg", quality=95)
    image = np.asarray(Image.open(tmp_path / "image.jpg"))
    expected = read_image(tmp_path / "image.jpg", (6, 6), 3).astype(int)
    assert np.abs(resized(page, image, (6, 6), 3, factor=4) - expected).max() <= 3
    assert Image.open(tmp_path / "image.jpg").draft(None, (24, 24))[1][2:] == (130 / 4, 97 / 4)


def test_pictures_are_cropped_and_padded_as_by_pillow(path, open_page):
    page = open_page(path, reduced_motion="reduce")
    for resize, fitted in {"crop": ImageOps.fit, "pad": ImageOps.pad}.items():
        for shape, size in [
            *[((37, 50), (8, 8)), ((50, 37), (8, 12)), ((9, 16), (16, 9))],
            ((35, 56), (8, 12)),  # Padded, 7.5 rows are its own.
        ]:
            image = np.random.default_rng(0).integers(0, 256, (*shape, 3)).astype("uint8")
            expected = fitted(Image.fromarray(image), size[::-1], Image.Resampling.BILINEAR)
            found = resized(page, image, size, 3, resize=resize)
            assert np.abs(found - np.asarray(expected).astype(int)).max() <= 1


def test_a_picture_file_is_answered_as_by_predict(small, path, open_page, tmp_path):
    model, _ = small
    pixels = np.random.default_rng(3).integers(0, 256, (40, 30, 4)).astype("uint8")
    page = answered(open_page(path, reduced_motion="reduce"))
    for name, image in {
        "transparent.png": Image.fromarray(pixels),
        "turned.jpg": Image.fromarray(pixels[..., :3]).resize((300, 400)),
    }.items():
        exif = Image.Exif()
        exif[0x0112] = 6  # To be turned by 90 degrees.
        image.save(tmp_path / name, **({"exif": exif} if name.endswith("jpg") else {}))
        page.locator("#file").set_input_files(tmp_path / name)
        page.wait_for_function(
            "name => document.querySelector('main').dataset.name === name", arg=name
        )
        expected = predict(model, read_image(tmp_path / name, (8, 12), 3)[None])[0]
        assert classes(answered(page)) == pytest.approx(dict(zip(NAMES, expected)), abs=0.0151)


def test_the_page_begins_with_test_images_and_asks_for_nothing(small, path, open_page):
    model, images = small
    page = answered(open_page(path, reduced_motion="reduce"))
    assert page.locator("h1").inner_text() == "Ant, bee </script> or cat?"
    probabilities = predict(model, images)
    for index in (0, 2):
        page.locator(".thumbnails button").nth(index).click()
        page.locator(f".thumbnails button:nth-child({index + 1})[aria-pressed=true]").wait_for()
        shown = classes(answered(page))
        assert shown == pytest.approx(dict(zip(NAMES, probabilities[index])), abs=0.00051)
        assert list(shown.values()) == sorted(shown.values(), reverse=True)
    assert page.locator("#label").inner_text() == "A test image, labelled cat"
    assert page.locator(".maps button").count() == 3 * (2 + 2)
    assert "://" not in path.read_text(encoding="utf-8")
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    assert policy.startswith("default-src 'none'; ") and "connect-src" not in policy


def test_patches_and_maps_are_chosen_by_pointer_and_keyboard(small, path, open_page):
    model, images = small
    page = answered(open_page(path, reduced_motion="reduce"))
    panel = page.locator("#picture")
    scores = attention_scores(model, images[:1])
    rollout = attention_rollout(scores)[0]
    box = panel.bounding_box()

    def place(row, column):
        return (
            box["x"] + box["width"] * (column - 0.5) / 3,
            box["y"] + box["height"] * (row - 0.5) / 2,
        )

    def says(text):
        page.wait_for_function(
            "text => document.querySelector('#caption').innerText === text", arg=text
        )

    def percent(weight):
        return f"{100 * weight:.{1 if weight < 0.1 else 0}f}\u00a0%"

    says("blocks 1 to 3 (rollout) · from class token")
    page.mouse.click(*place(1, 2))
    says("blocks 1 to 3 (rollout) · from row 1, column 2 · pinned")
    page.mouse.move(*place(2, 1))
    start = "blocks 1 to 3 (rollout) · from row 1, column 2"
    says(f"{start} · to row 2, column 1: {percent(rollout[2, 4])}")
    page.locator(".maps button").nth(4 + 3).click()  # Of the second block, its last head.
    panel.focus()
    panel.press("ArrowRight")
    weight = percent(scores[0, 1, 1, 2, 3])
    says(f"block 2, head 2 · from row 1, column 2 · to row 1, column 3: {weight}")
    panel.press("Enter")
    says("block 2, head 2 · from row 1, column 2")
    panel.press("Escape")
    says("block 2, head 2 · from class token")
    page.locator(".maps button[aria-checked=true]").press("ArrowDown")
    says("block 3, head 2 · from class token")
    page.locator(".maps button[aria-checked=true]").press("ArrowLeft")
    says("block 3, head 1 · from class token")


def test_what_the_model_learned_unfolds_and_follows_the_picture(small, path, open_page):
    model, images = small
    page = answered(open_page(path, reduced_motion="reduce"))
    assert page.locator(".lessons").is_hidden()
    page.locator(".learned summary").press("Enter")
    kernel, _ = model.get_layer("patch_embedding").get_weights()
    # As many components as pixels of a patch, which explain all of the variance.
    percents = [float(text) for text in page.locator(".filters span").all_inner_texts()]
    assert len(percents) == len(patch_filters(kernel, 4)[0])
    assert sum(percents) == pytest.approx(100, abs=0.5)
    size = "image => [image.naturalHeight, image.naturalWidth]"
    mosaic = page.locator("figure > img")
    assert mosaic.evaluate(size) == [2 * (2 + 1) - 1, 3 * (3 + 1) - 1]
    for index in (0, 3):
        page.locator(".thumbnails button").nth(index).click()
        page.locator(f".thumbnails button:nth-child({index + 1})[aria-pressed=true]").wait_for()
        answered(page)
        titles = page.locator(".plot i:not(.mean)").evaluate_all("dots => dots.map(x => x.title)")
        scores = attention_scores(model, images[index : index + 1])
        expected = attention_distance(scores, grid=(2, 3), patch_size=4)[0]
        found = np.array([float(title.split(": ")[1]) for title in titles]).reshape(3, 2)
        np.testing.assert_allclose(found, expected, atol=0.051)
        assert titles[5].startswith("block 3, head 2: ")
    assert page.locator(".plot .unread").count() == 2
    means = "; ".join(f"block {i}: {x:.1f}" for i, x in enumerate(expected.mean(axis=1), start=1))
    assert page.locator(".plot").get_attribute("aria-label").endswith(f"mean of 2 heads: {means}")


def test_pictures_are_dropped_and_pasted(small, path, open_page):
    model, images = small
    page = answered(open_page(path, reduced_motion="reduce"))
    names = ["dropped", "pasted"]
    for name, image, event in zip(
        names, images[1:], ["DragEvent('drop'", "ClipboardEvent('paste'"]
    ):
        file = io.BytesIO()
        Image.fromarray(image).save(file, "PNG")
        page.evaluate(
            """([name, content]) => {
              const data = new DataTransfer();
              data.items.add(new File([bytesOf(content)], name, { type: "image/png" }));
              document.dispatchEvent(new EVENT, { dataTransfer: data, clipboardData: data }));
            }""".replace("EVENT", event),
            [name, base64.b64encode(file.getvalue()).decode()],
        )
        page.locator(f"main[data-name={name}]").wait_for()
        expected = predict(model, image[None])[0]
        assert classes(page) == pytest.approx(dict(zip(NAMES, expected)), abs=0.00051)
    page.evaluate(
        "document.dispatchEvent(new ClipboardEvent('paste', { clipboardData: new DataTransfer() }))"
    )
    assert page.locator("#problem").inner_text().startswith("No picture came with that.")


def test_what_is_no_picture_is_refused_and_the_answer_stays(path, open_page, tmp_path):
    page = answered(open_page(path, reduced_motion="reduce"))
    before = classes(page)
    (tmp_path / "notes.txt").write_text("no picture")
    page.locator("#file").set_input_files(tmp_path / "notes.txt")
    page.locator("#problem:not(:empty)").wait_for()
    assert page.locator("#problem").inner_text() == (
        "This browser cannot read notes.txt as a picture. Try a JPEG or PNG file."
    )
    assert classes(answered(page)) == before


def test_a_page_without_images_in_polish_on_a_phone(small, open_page, tmp_path):
    model, _ = small
    assert write_page(tmp_path / "page.html", model, language="pl") == 0
    page = open_page(
        tmp_path / "page.html", viewport={"width": 390, "height": 844}, color_scheme="dark"
    )
    assert page.locator("h1").inner_text() == "Ant, bee </script> czy cat?"
    assert page.locator("#classes").is_hidden() and page.locator(".thumbnails").count() == 0
    assert page.locator("#picture").get_attribute("role") is None  # Until there is a picture.
    file = io.BytesIO()
    Image.new("RGB", (50, 20), "red").save(file, "PNG")
    content = {"name": "red.png", "mimeType": "image/png", "buffer": file.getvalue()}
    page.locator("#file").set_input_files(content)
    answered(page)
    assert re.search(r"\d,\d\u00a0%", page.locator("#classes").inner_text())
    assert page.locator("#said").inner_text().count("%") == 3
    assert page.locator("#picture").get_attribute("role") == "application"
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_the_baseline_fits_into_12_megabytes_with_16_bits_per_weight(tmp_path):
    model = VisionTransformer()
    write_page(tmp_path / "page.html", model)
    assert (tmp_path / "page.html").stat().st_size < 12e6
    packed = pages.pack(model)
    assert packed["sizes"]["parameters"] == model.count_params() - 7 == 3_195_146
    assert len(packed["levels"]) == pytest.approx(3_195_146 * 2 * 4 / 3, abs=4)


def test_models_that_a_page_cannot_run_are_named(small, monkeypatch, tmp_path):
    model, _ = small
    quantized, broken = made(SMALL)[0], made(SMALL)[0]
    quantized.get_layer("head").quantize("int8")
    broken.get_layer("head").bias.assign([0, np.nan, 0])
    for wrong, message in [
        (keras.models.clone_model(model), "of class Functional. In place of `keras.models.clone"),
        (VisionTransformer(**{**SMALL, "image_shape": (8, 12, 4)}), "1 or 3 channels.*with 4"),
        (
            VisionTransformer(**{**SMALL, "augmentation": [keras.layers.Rescaling(0.5, name="r")]}),
            "with layer 'r', a Rescaling",
        ),
        (quantized, "not quantized.*'head'"),
        (broken, "head/bias has NaN"),
    ]:
        with pytest.raises(ValueError, match=message):
            write_page(tmp_path / "page.html", wrong)
    monkeypatch.setattr(pages, "MAX_SCORES", 3 * 2 * 7**2 - 1)
    with pytest.raises(ValueError, match="at most 293 attention scores.*with 294"):
        write_page(tmp_path / "page.html", model)
    monkeypatch.setattr(pages, "MAX_PARAMETERS", 100)
    with pytest.raises(ValueError, match="at most 100 parameters"):
        write_page(tmp_path / "page.html", model)
    assert not list(tmp_path.iterdir())
