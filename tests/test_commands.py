"""The command `keras-vit`: a folder of images trained on, and the model put to use."""

import csv
import io
import json
import re
import subprocess
import sys

import keras
import numpy as np
import pytest
from PIL import Image

from keras_vit import RandomResizedCrop, VisionTransformer, commands, load_model

TINY = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=2", "--epochs=1"]


@pytest.fixture(autouse=True)
def keep_the_backend(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder of 60 images, red ones and blue ones, and the run of a model trained on them."""
    root = tmp_path_factory.mktemp("place")
    random = np.random.default_rng(0)
    for name, channel in (("rot", 0), ("blå", 2)):
        (root / "images" / name).mkdir(parents=True)
        for index in range(30):
            pixels = random.integers(0, 80, (20, 24, 3))
            pixels[..., channel] += 150
            image = Image.fromarray(pixels.astype("uint8"))
            image.save(root / "images" / name / f"{index}.jpg")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setenv("KERAS_BACKEND", keras.backend.backend())
        places = [f"--output={root / 'run'}", f"--figures-dir={root / 'figures'}"]
        words = [f"--dataset={root / 'images'}", "--learning-rate=0.003", "--batch-size=8"]
        assert commands.main(["train", *TINY, *words, "--image-size=16", *places]) == 0
    return root


def run(*words):
    return commands.main([str(word) for word in words])


def test_a_folder_is_trained_on_and_its_names_travel_with_the_model(place):
    model = load_model(place / "run" / "model.keras")
    assert model.class_names == ("blå", "rot")
    assert model.input_shape == (None, 16, 16, 3)
    metrics = json.loads((place / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["dataset"] == "images"
    assert set(metrics["per_class"]) == {"blå", "rot"}


def expected(place, path):
    model = load_model(place / "run" / "model.keras")
    image = Image.open(path).resize((16, 16), Image.BILINEAR)
    logits = model.predict(np.asarray(image)[None], verbose=0)[0].astype("float64")
    return dict(zip(model.class_names, np.exp(logits) / np.exp(logits).sum()))


def test_predictions_are_the_models(place, capsys):
    paths = [place / "images" / "rot" / "3.jpg", place / "images" / "blå" / "4.jpg"]
    assert run("predict", place / "run" / "model.keras", *paths, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths):
        found = {pair["class"]: pair["probability"] for pair in row["predictions"]}
        assert found == pytest.approx(expected(place, path), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_predictions_come_as_lines_and_as_a_table(place, capsys):
    path = place / "images" / "rot" / "3.jpg"
    assert run("predict", place / "run" / "model.keras", path) == 0
    line = capsys.readouterr().out
    best, share = max(expected(place, path).items(), key=lambda pair: pair[1])
    assert line.startswith(f"{path}: {best} {share:.1%}, ")
    assert run("predict", place / "run" / "model.keras", place / "images" / "rot", "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 30 * 2
    assert list(rows[0]) == ["image", "rank", "class", "probability"]
    assert {row["rank"] for row in rows} == {"1", "2"}


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(place, capsys, monkeypatch, tmp_path):
    broken, right = tmp_path / "broken.png", place / "images" / "rot" / "3.jpg"
    broken.write_bytes(b"no image")
    monkeypatch.setattr(
        sys, "stdin", io.StringIO(f"{broken}\n\n{tmp_path / 'gone.png'}\n{right}\n")
    )
    assert run("predict", place / "run" / "model.keras", "-") == 1
    captured = capsys.readouterr()
    assert captured.out.startswith(f"{right}: ") and captured.out.count("\n") == 1
    broken_line, gone_line = captured.err.splitlines()
    assert (
        broken_line == f"error: {broken} cannot be read: cannot identify image file {str(broken)!r}"
    )
    assert gone_line.startswith(f"error: {tmp_path / 'gone.png'} cannot be read: ")


def test_hidden_files_are_not_looked_at(place, capsys, tmp_path):
    for name in (".git", "seen"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.txt").write_text("no image")
    assert run("predict", place / "run" / "model.keras", tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_without_names_is_measured_and_numbers_its_classes(
    place, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    model = load_model(place / "run" / "model.keras")
    nameless = VisionTransformer.from_config({**model.get_config(), "class_names": None})
    nameless.save(tmp_path / "model.keras")
    assert run("evaluate", tmp_path / "model.keras", "--dataset", place / "images") == 0
    assert run("predict", tmp_path / "model.keras", place / "images" / "rot" / "3.jpg") == 0
    assert re.search(r"3.jpg: [01] [\d.]+%, [01] ", capsys.readouterr().out)


def test_images_that_are_not_square_stay_so(capsys, monkeypatch, place, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    places = [f"--output={tmp_path / 'run'}", f"--figures-dir={tmp_path / 'figures'}"]
    assert commands.main(["train", *TINY, f"--dataset={place / 'images'}", *places]) == 0
    model = tmp_path / "run" / "model.keras"
    assert load_model(model).input_shape == (None, 20, 24, 3)
    assert run("evaluate", model, "--dataset", place / "images") == 0


def test_a_saved_model_is_measured_as_after_training(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    words = ["--dataset", place / "images", "-o", tmp_path / "out"]
    assert run("evaluate", place / "run" / "model.keras", *words) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    metrics = json.loads((place / "run" / "metrics.json").read_text(encoding="utf-8"))
    for name in ("accuracy", "loss", "calibration_error", "per_class", "parameters"):
        assert found[name] == metrics[name]
    assert f"Test accuracy {metrics['accuracy']:.2%}" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 6


def test_explanations_are_drawn_for_each_image(place, capsys, tmp_path):
    images = [place / "images" / name / "3.jpg" for name in ("rot", "blå")]
    words = [*images, tmp_path / "gone.jpg", "-o", tmp_path / "out", "--html"]
    assert run("explain", place / "run" / "model.keras", *words) == 1
    pictures = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert pictures == ["3-attention-2.png", "3-attention.png", "explorer.html"]
    captured = capsys.readouterr()
    assert "gone.jpg cannot be read" in captured.err
    best, share = max(expected(place, images[0]).items(), key=lambda pair: pair[1])
    assert (
        f"{images[0]}: {best} {share:.0%}, {tmp_path / 'out' / '3-attention.png'}" in captured.out
    )
    assert "3.jpg: rot" in (tmp_path / "out" / "explorer.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("format", "package", "name"),
    [
        ("onnx", "tf2onnx", "model.onnx"),
        ("saved_model", "tensorflow", "model"),
        ("litert", "ai_edge_litert", "model.tflite"),
    ],
)
def test_exports_answer_in_their_runtimes_as_keras_does(
    place, capsys, tmp_path, format, package, name
):
    """Batches of 1, 8 and 256 are compared, on images that need no preprocessing by hand."""
    pytest.importorskip(package)
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the command runs on TensorFlow")
    words = ["--format", format, "-o", tmp_path / "new" / name]
    assert run("export", place / "run" / "model.keras", *words) == 0
    out = capsys.readouterr().out
    assert (tmp_path / "new" / name).exists()
    difference = float(re.search(r"on 256 images of noise: (\S+)", out)[1])
    assert difference < 1e-5
    assert len(re.findall(r"\d ms for one image, +[\d,]+ images/s", out)) == 2


def test_what_is_exported_takes_pixels_and_gives_probabilities(place):
    from keras_vit.export import served

    model = load_model(place / "run" / "model.keras")
    images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3))
    logits = model.predict(images, verbose=0).astype("float64")
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    exported = served(model)
    np.testing.assert_allclose(exported.predict(images, verbose=0), expected, atol=1e-5)
    names = {type(layer).__name__ for layer in exported._flatten_layers()}
    assert not names & {"RandomFlip", "RandomResizedCrop"}


def test_layers_that_change_images_in_inference_are_exported_and_no_others():
    from keras_vit.export import served

    layers = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.Rescaling(1 / 255),
        keras.layers.RandomContrast(0.5),
        RandomResizedCrop(4, 8),
        keras.layers.Lambda(lambda x: x * x),
    ]
    sizes = {"embed_dim": 8, "mlp_dim": 8, "num_heads": 2, "depth": 1}
    model = VisionTransformer((16, 16, 3), augmentation=layers, **sizes)
    images = np.random.default_rng(1).integers(0, 256, (5, 16, 16, 3))
    model.adapt(images)
    exported = served(model)
    expected = keras.ops.softmax(model.predict(images, verbose=0))
    np.testing.assert_allclose(
        exported.predict(images, verbose=0), keras.ops.convert_to_numpy(expected), atol=1e-6
    )
    kinds = [type(layer).__name__ for layer in exported.layers[1:5]]
    assert kinds == ["Rescaling", "RandomResizedCrop", "Lambda", "Normalization"]


def test_a_frozen_model_is_exported_as_well(place):
    from keras_vit.export import served

    model = load_model(place / "run" / "model.keras")
    model.trainable = False
    images = np.zeros((1, 16, 16, 3))
    assert served(model).predict(images, verbose=0).sum() == pytest.approx(1)


def test_pictures_of_a_run_stay_in_its_folder_and_show_any_name(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    for name in ("$_$", "accuracy"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(5):
            image = Image.fromarray(np.full((9, 9, 3), index, "uint8"))
            image.save(tmp_path / "images" / name / f"{index}.png")
    words = ["--dataset=images", "--image-size=8", "--no-horizontal-flip", "--output=run"]
    assert run("train", *TINY, *words) == 0
    assert len(list((tmp_path / "run" / "figures").glob("*.png"))) == 7
    assert not (tmp_path / "figures").exists()
    layers = load_model("run/model.keras").augmentation
    assert [type(layer).__name__ for layer in layers] == ["RandomResizedCrop"]


def test_an_export_that_answers_otherwise_is_an_error(place, capsys, monkeypatch, tmp_path):
    from keras_vit import export

    if keras.backend.backend() != "tensorflow":
        pytest.skip("the command runs on TensorFlow")
    right = export.runner

    def wrong(path, format):
        run = right(path, format)
        return lambda images: run(images) + 0.002

    monkeypatch.setattr(export, "runner", wrong)
    words = ["--format", "saved_model", "-o", tmp_path / "model"]
    assert run("export", place / "run" / "model.keras", *words) == 1
    assert "differs from Keras by more than 0.001" in capsys.readouterr().err


WRONG = {
    "": "the following arguments are required: COMMAND",
    "fly": "invalid choice: 'fly'",
    "predict": "required: MODEL, IMAGE",
    "predict missing.keras x.png": "missing.keras cannot be read: No such file or directory",
    "predict model.h5 x.png": "model.h5 does not end in .keras",
    "predict {model} x.png --json --csv": "not allowed with argument",
    "export {model} --format onnx -o model": "--format onnx must end in .onnx",
    "export {model} --format torch -o x": "invalid choice: 'torch'",
    "predict {deep} x.png": "takes images of 4 channels, not grey or RGB",
    "predict {net} x.png": "holds a Sequential, not a VisionTransformer",
    "export {net} --format saved_model -o x": "holds a Sequential, not a VisionTransformer",
    "explain {net} x.png -o x": "holds a Sequential, not a VisionTransformer",
    "evaluate {model} --dataset {images} -o {run}": "holds a run, whose numbers would be lost",
    "explain {model} x.png": "required: -o/--output",
    "evaluate {model} --dataset digits": "takes images of (16, 16, 3), digits has (32, 32, 3)",
    "evaluate {model} --dataset missing.npz": "missing.npz cannot be read",
    "evaluate {model} --dataset {others}": "tells apart blå, rot, but others a, b",
    "train --dataset {images} --image-size 15": "patch_size=4, height=15, width=15",
    "train --dataset {empty}": "has no images in sub-folders",
    "train --dataset digits --image-size 16": "is for folders of images",
}


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_said_in_one_line(words, place, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for name in ("a", "b"):
        (tmp_path / "others" / name).mkdir(parents=True)
        for index in range(5):
            image = Image.fromarray(np.full((9, 9, 3), index, "uint8"))
            image.save(tmp_path / "others" / name / f"{index}.png")
    places = {name: tmp_path / name for name in ("empty", "others")}
    places |= {
        "run": place / "run",
        "model": place / "run" / "model.keras",
        "images": place / "images",
    }
    places |= {"net": tmp_path / "net.keras", "deep": tmp_path / "deep.keras"}
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(places["net"])
    VisionTransformer((8, 8, 4), depth=1, embed_dim=8, num_heads=1).save(places["deep"])
    assert run(*words.format(**places).split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert WRONG[words] in captured.err


def test_help_answers_without_importing_keras():
    for words in (["--help"], ["predict", "--help"], ["train", "--help"]):
        timed = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "keras_vit", *words],
            capture_output=True,
            text=True,
        )
        assert timed.returncode == 0
        assert "usage: keras-vit" in timed.stdout
        assert " keras\n" not in timed.stderr and " numpy\n" not in timed.stderr
