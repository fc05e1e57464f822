"""The report and the attention explorer in a real browser, beside NumPy and the run's files."""

import base64
import hashlib
import json
import os
import pathlib
import re
import shutil

import keras
import numpy as np
import pytest

import keras_vit
from keras_vit import (
    VisionTransformer,
    attention_rollout,
    attention_scores,
    patch_weights,
)
from keras_vit.reporting import figures
from keras_vit.reporting.explorer import MAX_BYTES, pack
from keras_vit.reporting.report import SECTIONS, write_explorer
from keras_vit.reporting.texts import load_texts
from keras_vit_cli import main
from keras_vit_cli import report as report_command

ROWS, COLUMNS, BLOCKS, HEADS = 2, 3, 3, 2
# Where screenshots are wanted, for looking at.
SCREENSHOTS = os.environ.get("KERAS_VIT_SCREENSHOTS")


@pytest.fixture(scope="module")
def small():
    """A model that attends sharply, and four images of 2x3 patches."""
    keras.utils.set_random_seed(1)
    model = VisionTransformer(
        **{"image_shape": (8, 12, 3), "num_classes": 3, "patch_size": 4, "embed_dim": 8},
        **{"mlp_dim": 8, "num_heads": HEADS, "depth": BLOCKS, "augmentation": []},
    )
    model.set_weights([3 * weight for weight in model.get_weights()])
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 12, 3)).astype("uint8")
    return model, images


@pytest.fixture(scope="module")
def explorer(small, tmp_path_factory):
    path = tmp_path_factory.mktemp("explorer") / "explorer.html"
    model, images = small
    titles = ["one", "two </script><b>bold</b>", "three", "four"]
    assert write_explorer(path, model, "small", images, titles) == 4
    return path


def shown(page):
    """The table of numbers, as weights of the patches."""
    cells = page.evaluate(
        "[...document.querySelectorAll('.numbers tr + tr td')].map(x => x.textContent)"
    )
    return np.array(cells, float) / 100


def assert_shown(page, expected):
    """Two digits are shown; eight bits may be one off in the last of them."""
    unit = np.where(expected < 0.1, 0.001, 0.01)
    assert np.all(np.abs(shown(page) - expected) < 1.5 * unit)


def percent(weight):
    return f"{100 * weight:.{1 if weight < 0.1 else 0}f} %"


def point_at(page, row, column, panel="#overlay"):
    box = page.locator(panel).bounding_box()
    x = box["x"] + box["width"] * (column - 0.5) / COLUMNS
    y = box["y"] + box["height"] * (row - 0.5) / ROWS
    page.mouse.move(x, y)
    return x, y


def slide(page, slider, value):
    page.locator(slider).fill(str(value))


def without_residual(scores):
    """The product of attention itself, heads averaged."""
    product = np.eye(scores.shape[-1])
    for block in scores.mean(axis=1):
        product = block @ product
    return product


def test_the_page_recomputes_the_rollout(small, explorer, open_page):
    model, images = small
    scores = attention_scores(model, images)
    page = open_page(explorer)
    for image in (0, 3):
        page.locator(".thumbnails button").nth(image).click()
        for fusion in ("mean", "max", "min"):
            page.locator("#head").select_option(fusion)
            for block in range(1, BLOCKS + 1):
                slide(page, "#block", block)
                expected = attention_rollout(scores[image : image + 1, :block], fusion)[0]
                assert_shown(page, expected[0, 1:])
                point_at(page, 2, 3)  # The last patch.
                assert_shown(page, expected[6, 1:])
                page.locator("#class-token").click()


def test_without_a_class_token_the_page_starts_from_all_patches(small, open_page, tmp_path):
    model, images = small
    model = VisionTransformer.from_config({**model.get_config(), "pooling": "mean"})
    model.set_weights([3 * weight for weight in model.get_weights()])
    path = tmp_path / "explorer.html"
    write_explorer(path, model, "mean", images[:1], ["one"])
    scores, page = attention_scores(model, images[:1]), open_page(path)
    assert page.locator("#class-token").text_content() == "From all patches"
    assert page.locator("#to-class").count() == 0
    slide(page, "#discard", 0.5)
    expected = attention_rollout(scores, discard_ratio=0.5, class_token=False)
    assert_shown(page, patch_weights(expected, class_token=False)[0])
    point_at(page, 1, 1)  # The first patch.
    assert_shown(page, expected[0, 0])
    page.locator("#class-token").click()
    page.locator("#view").select_option("attention")
    assert_shown(page, scores[0, -1].mean(axis=0).mean(axis=0))


def test_discarding_heads_and_the_residual_can_be_switched(small, explorer, open_page):
    model, images = small
    scores = attention_scores(model, images[:1])
    page = open_page(explorer)
    slide(page, "#discard", 0.5)
    expected = attention_rollout(scores, discard_ratio=0.5)[0, 0, 1:]
    assert_shown(page, expected)
    slide(page, "#discard", 0)
    page.locator("#residual").uncheck()
    assert_shown(page, without_residual(scores[0])[0, 1:])
    page.locator("#residual").check()
    page.locator("#head").select_option("1")
    expected = attention_rollout(scores[:, :, 1:2])[0, 0, 1:]
    assert_shown(page, expected)
    page.locator("#view").select_option("attention")
    slide(page, "#block", 2)
    assert_shown(page, scores[0, 1, 1, 0, 1:])


def test_a_patch_is_pinned_by_a_click_and_its_weights_read_by_pointing(small, explorer, open_page):
    model, images = small
    expected = attention_rollout(attention_scores(model, images[:1]))[0]
    page = open_page(explorer)
    page.mouse.click(*point_at(page, 1, 2))
    assert page.locator("#query").inner_text() == "from row 1, column 2 · pinned"
    point_at(page, 2, 1)
    assert page.locator("#target").inner_text() == (
        f"to row 2, column 1: {percent(expected[2, 4])}"
    )
    assert page.locator("#to-class").inner_text() == f"to class token: {percent(expected[2, 0])}"
    first = page.locator("#readout li").first.inner_text()
    best = expected[2, 1:].argmax()
    assert first.startswith(f"row {best // COLUMNS + 1}, column {best % COLUMNS + 1}: ")
    page.mouse.click(*point_at(page, 1, 2))
    point_at(page, 2, 3)
    assert page.locator("#query").inner_text() == "from row 2, column 3"
    assert page.locator("#said").text_content() == "from row 2, column 3"


def test_the_keyboard_does_what_the_pointer_does(explorer, open_page):
    page = open_page(explorer)
    panel = page.locator("#overlay")
    panel.focus()
    for keys, expected in {
        "ArrowRight": "from row 1, column 1",
        "ArrowRight ArrowDown": "from row 2, column 2",
        "ArrowDown": "from row 2, column 2",
        "Enter": "from row 2, column 2 · pinned",
        "Home": "from class token",
    }.items():
        for key in keys.split():
            panel.press(key)
        assert page.locator("#query").inner_text() == expected
    for key in ("ArrowRight", "Enter", "ArrowRight"):
        panel.press(key)
    assert page.locator("#query").inner_text() == "from row 1, column 1 · pinned"
    assert page.locator("#target").inner_text().startswith("to row 1, column 2: ")


def test_a_finger_does_so_too(explorer, open_page):
    page = open_page(explorer, viewport={"width": 390, "height": 844}, has_touch=True)
    box = page.locator("#overlay").bounding_box()
    page.touchscreen.tap(box["x"] + box["width"] / 2, box["y"] + box["height"] / 4)
    assert page.locator("#query").inner_text() == "from row 1, column 2 · pinned"


def test_the_strength_of_the_overlay_can_be_set(explorer, open_page):
    page = open_page(explorer)
    darkest = """() => {
      const canvas = document.querySelector("#overlay canvas");
      const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
      return Math.max(...data.filter((_, i) => i % 4 === 3));
    }"""
    slide(page, "#strength", 0.2)
    assert page.evaluate(darkest) == 0.2 * 255


def test_on_a_phone_the_image_comes_before_the_controls(small, open_page, tmp_path):
    model, images = small
    path = tmp_path / "explorer.html"
    write_explorer(path, model, "small", images, ["a_long_name_" * 9, "b", "c", "d"])
    page = open_page(path, viewport={"width": 390, "height": 844})
    tops = [page.locator(x).first.bounding_box()["y"] for x in (".panels", ".controls")]
    assert tops == sorted(tops)
    first, second = (page.locator(".thumbnails button").nth(i).bounding_box() for i in (0, 1))
    assert first["y"] == second["y"] and first["x"] + first["width"] <= second["x"]
    overflow = "() => document.querySelector('.thumbnails span').scrollWidth - 96"
    assert page.evaluate(overflow) <= 0
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")


def test_titles_are_text_and_nothing_else(explorer, open_page):
    page = open_page(explorer)
    page.locator(".thumbnails button").nth(1).click()
    assert page.locator("#readout strong").inner_text() == "two </script><b>bold</b>"
    assert page.locator("b").count() == 0


def test_what_does_not_fit_into_a_page_is_left_out(small, monkeypatch):
    model, images = small
    one = BLOCKS * HEADS * (1 + ROWS * COLUMNS) ** 2
    monkeypatch.setattr("keras_vit.reporting.explorer.MAX_BYTES", 2 * one + 1)
    assert len(pack(model, images, list("abcd"))["images"]) == 2
    # What is too much for a single image is fused to the mean of its heads.
    monkeypatch.setattr("keras_vit.reporting.explorer.MAX_BYTES", one - 1)
    packed = pack(model, images, list("abcd"))
    assert packed["heads"] == len(packed["images"]) == 1
    levels = np.frombuffer(base64.b64decode(packed["levels"]), "uint8").reshape(BLOCKS, 7, 7)
    scales = np.frombuffer(base64.b64decode(packed["scales"]), "<f4").reshape(BLOCKS, 7, 1)
    expected = attention_scores(model, images[:1])[0].mean(axis=1)
    np.testing.assert_allclose((levels / 255) ** 2 * scales, expected, atol=0.005)
    monkeypatch.setattr("keras_vit.reporting.explorer.MAX_BYTES", one // HEADS - 1)
    with pytest.raises(ValueError, match=f"Received: model with {one // HEADS}"):
        pack(model, images, list("abcd"))
    with pytest.raises(ValueError, match="Expected at least one image"):
        pack(model, images[:0], [])
    assert MAX_BYTES * 4 / 3 < 5 * 2**20  # In base64, and the report's pictures beside it.


@pytest.fixture
def run(place, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    return place / "run"


def test_the_report_has_all_sections_with_the_numbers_of_the_run(run, open_page):
    metrics = json.loads((run / "metrics.json").read_text())
    page = open_page(run / "report.html", viewport={"width": 1200, "height": 900})
    assert page.locator("main > section").count() == len(SECTIONS) == 10
    headline = page.locator(".headline").inner_text()
    assert f"{metrics['accuracy']:.2%}" in headline
    assert f"{metrics['parameters']:,}" in headline
    captions = page.locator("#learned figcaption").all_inner_texts()
    assert [caption.split()[0] for caption in captions] == ["Principal", "Each", "How"]
    training = page.locator("#training").inner_text()
    assert re.search(r"divided by 10 after epoch 1\s", training) and "AdamW" in training
    row = page.locator("#results tr").nth(3).inner_text().split()
    assert row[:2] == ["blå", f"{metrics['per_class']['blå']['precision']:.3f}"]
    images = page.evaluate("[...document.images].map(x => x.naturalWidth)")
    assert len(images) == 11 + 12 + 1 and min(images) > 0
    assert page.locator(".thumbnails button").count() == 12
    assert (run / "report.html").stat().st_size < 6 * 2**20


def test_the_report_leads_to_the_page_that_runs_the_model(run, open_page):
    page = open_page(run / "report.html")
    link = page.locator("header p a")
    assert link.inner_text() == "Try the model on a picture of your own"
    page = open_page(run / link.get_attribute("href"))
    page.locator("main:not(.waiting)").wait_for()
    assert page.locator("h1").inner_text() == "$_$, accuracy or blå?"
    assert page.locator(".thumbnails button").count() == 12


def test_the_source_is_shown_as_it_is(run, open_page):
    page = open_page(run / "report.html")
    fold = page.locator("#patches details")
    assert not fold.locator("pre").is_visible()
    fold.locator("summary").click()
    source = (pathlib.Path(keras_vit.__file__).parent / "layers" / "patches.py").read_text()
    assert fold.locator("pre").inner_text().strip() in source
    assert "class Patches" in fold.locator("pre").inner_text()


@pytest.mark.parametrize("name", ["wide", "phone", "dark"])
def test_the_report_fits_every_screen(run, open_page, name):
    settings = {
        "wide": {"viewport": {"width": 1200, "height": 900}},
        "phone": {"viewport": {"width": 390, "height": 844}},
        "dark": {"viewport": {"width": 1200, "height": 900}, "color_scheme": "dark"},
    }
    page = open_page(run / "report.html", **settings[name])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    brightness = sum(map(int, re.findall(r"\d+", ground)))
    assert brightness < 150 if name == "dark" else brightness > 700
    if SCREENSHOTS:
        page.screenshot(path=pathlib.Path(SCREENSHOTS) / f"report-{name}.png", full_page=True)


@pytest.mark.slow
def test_the_report_can_be_written_again_in_polish(run, open_page, monkeypatch, tmp_path):
    again = tmp_path / "run"
    shutil.copytree(run, again)
    before = (again / "report.html").read_text(encoding="utf-8")
    assert main.main(["report", str(again)]) == 0
    after = (again / "report.html").read_text(encoding="utf-8")
    numbers = r"<strong>[^<]*</strong>"
    assert re.findall(numbers, before) == re.findall(numbers, after)
    assert before.count("data:image/png") == after.count("data:image/png") == 11 + 12
    languages = []  # Drawing once is enough.
    monkeypatch.setattr(figures, "draw_all", lambda *arguments: languages.append(arguments[-1]))
    # Another report, another checksum.
    sums = dict(line.split()[::-1] for line in (again / "SHA256SUMS").read_text().splitlines())
    content = (again / "report.html").read_bytes()
    assert sums["report.html"] == hashlib.sha256(content).hexdigest()
    assert main.main(["report", str(again), "--language", "pl"]) == 0
    assert languages == ["pl"]
    sums = (again / "SHA256SUMS").read_text()
    assert "report.pl.html" in sums and "page.pl.html" in sums
    assert (again / "report.html").read_text(encoding="utf-8") == after
    page = open_page(again / "report.pl.html")
    assert page.locator("html").get_attribute("lang") == "pl"
    assert "Cięcie obrazu na łatki" in page.locator("#patches h2").inner_text()
    assert re.search(r"\d,\d\d%", page.locator(".headline").inner_text())
    assert "token klasy" in page.locator("#query").inner_text()


@pytest.mark.slow
def test_a_run_and_its_explanations_in_polish_have_polish_pictures(run, monkeypatch, tmp_path):
    languages = []
    monkeypatch.setattr(figures, "draw_all", lambda *arguments: languages.append(arguments[-1]))
    sizes = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=1", "--batch-size=8"]
    words = ["--dataset=digits", "--limit-train=16", "--epochs=1", "--language=pl"]
    assert main.main(["train", *sizes, *words, f"--output={tmp_path / 'run'}"]) == 0
    page = (tmp_path / "run" / "report.html").read_text(encoding="utf-8")
    titles = re.findall('"title": "([^"]*)"', page)
    assert any(re.fullmatch(r"przewidziana: \d,\\nprawdziwa: \d", title) for title in titles)
    monkeypatch.setattr(
        figures, "draw_attention_rollout", lambda *_, language: languages.append(language)
    )
    image = run.parent / "images" / "blå" / "0.png"
    words = ["-o", str(tmp_path / "explained"), "--language=pl"]
    assert main.main(["explain", str(run / "model.keras"), str(image), *words]) == 0
    assert languages == ["pl", "pl"]


def test_both_languages_say_the_same_things():
    def shape(value):
        if isinstance(value, dict):
            return {key: shape(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [shape(inner) for inner in value]
        return sorted(re.findall(r"\{\{?.*?\}", value))

    english, polish = (shape(load_texts(language)) for language in ("en", "pl"))
    assert english == polish


def test_a_report_is_written_on_data_that_have_moved(run, capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(report_command, "draw", lambda *_: None)
    monkeypatch.setattr(report_command, "write_pages", lambda *_: None)
    again, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(run, again)
    shutil.copytree(run.parent / "images", moved)
    settings = json.loads((again / "config.json").read_text(encoding="utf-8"))
    (again / "config.json").write_text(json.dumps({**settings, "dataset": "gone.npz"}))
    assert main.main(["report", str(again)]) == 2
    assert "name them with --dataset or --data-dir" in capsys.readouterr().err
    assert main.main(["report", str(again), "--dataset", str(moved)]) == 0
    for path in (moved / "accuracy").iterdir():
        path.write_bytes((run.parent / "images" / "blå" / path.name).read_bytes())
    assert main.main(["report", str(again), "--dataset", str(moved)]) == 2
    assert "other training images or labels than" in capsys.readouterr().err


def test_a_report_wants_a_finished_run(capsys, run, tmp_path):
    assert main.main(["report", str(tmp_path)]) == 2
    assert "config.json cannot be read" in capsys.readouterr().err
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "metrics.json").unlink()
    assert main.main(["report", str(tmp_path / "run")]) == 2
    assert "holds no finished run" in capsys.readouterr().err
