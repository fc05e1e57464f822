"""The command `keras-vit`: a folder of images trained on, and the model put to use."""

import csv
import dataclasses
import io
import json
import os
import re
import shutil
import subprocess
import sys
import types
import zipfile

import keras
import numpy as np
import pytest
from conftest import CLASSES, coloured
from PIL import Image

from keras_vit import RandomResizedCrop, VisionTransformer, data, files, load_model
from keras_vit.data import folders
from keras_vit.data.dataset import SHORT
from keras_vit.files import visible
from keras_vit.reporting import figures
from keras_vit_cli import evaluate, inputs, main, predict, settings, train
from keras_vit_cli.errors import CommandError


@pytest.fixture(autouse=True)
def keep_the_backend(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())


@pytest.fixture(scope="module")
def model(place):
    return load_model(place / "run" / "model.keras")


def run(*words):
    return main.main([str(word) for word in words])


def test_a_folder_is_trained_on_and_its_names_travel_with_the_model(place, model):
    assert model.class_names == tuple(CLASSES)
    assert model.input_shape == (None, 20, 24, 3)  # Those of one size keep it.
    assert [type(layer).__name__ for layer in model.augmentation] == ["RandomResizedCrop"]
    metrics = json.loads((place / "run" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["dataset"] == "images"
    assert set(metrics["per_class"]) == set(CLASSES)


def test_pictures_of_a_run_stay_in_its_folder(place):
    assert len(list((place / "run" / "figures").glob("*.png"))) == 11
    assert {path.name for path in place.iterdir()} == {"cache", "images", "run"}


def test_a_run_starts_from_the_weights_of_another_one(place, model, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    words = [f"--dataset={place / 'images'}", f"--output={tmp_path}", "--epochs=1"]
    assert run("train", *words, f"--init-from={place / 'run'}", "--freeze=2") == 0
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["recipe"], config["freeze"], config["embed_dim"]) == ("finetune", 2, 16)
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"Trained from the weights of {place / 'run'} on" in report
    assert "channel are those of the weights" in report
    tuned = load_model(tmp_path / "model.keras")
    for name in ("position_embedding", "block_2_mlp_output", "normalization"):
        pairs = zip(tuned.get_layer(name).get_weights(), model.get_layer(name).get_weights())
        assert all(np.array_equal(*pair) for pair in pairs)
    assert not np.array_equal(*(x.get_layer("norm").get_weights()[1] for x in (tuned, model)))


def test_images_that_the_weights_were_trained_on_are_not_tested_on(
    place, model, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in CLASSES:  # The split depends on the names.
        shutil.copytree(place / "images" / name, tmp_path / "set" / f"{name} 2")
    dataset = data.load_dataset(str(tmp_path / "set"))
    tested = [x.digest[:SHORT] in model.seen for x in dataset.manifest if x.split == "test"]
    assert any(tested) and not all(tested)
    left = train.without_images_of(model, dataset, "runs/x")
    np.testing.assert_array_equal(left.test_images, dataset.test_images[~np.array(tested)])
    expected = f"WARNING: left out {sum(tested)} test image"
    assert expected in (error := capsys.readouterr().err) and "runs/x was trained on" in error
    assert train.without_images_of(None, dataset, None) is dataset
    monkeypatch.setattr(
        model, "seen", model.seen + tuple(x.digest[:SHORT] for x in dataset.manifest)
    )
    with pytest.raises(CommandError, match="was trained on all test images of set: choose"):
        train.without_images_of(model, dataset, "runs/x")


def test_validation_images_that_the_weights_were_trained_on_are_counted(
    place, model, capsys, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    dataset, _ = data.load_dataset(str(place / "images")).hold_out(6, seed=0)
    parent = settings.read_config(place / "run" / "config.json")
    chosen = {"init_from": str(place / "run"), "validation": 6, "seed": parent["seed"]}
    train.warn_of_seen(model, dataset, types.SimpleNamespace(extend=None, **chosen))
    assert "trained or validated on 6 of the 6 validation images" in capsys.readouterr().err
    # The run held out no image, so those of the longer one were trained on.
    train.warn_of_seen(model, dataset, types.SimpleNamespace(extend=5, **chosen))
    assert "trained or validated on 6 of the 6 validation images" in capsys.readouterr().err
    arrays = dataclasses.replace(dataset, manifest=None)
    train.warn_of_seen(model, arrays, types.SimpleNamespace(extend=5, **chosen))
    assert "trained on other images than these: it may have" in capsys.readouterr().err
    same = data.load_dataset(str(place / "images"))
    train.warn_of_seen(model, same, types.SimpleNamespace(extend=5, **chosen))
    train.warn_of_seen(None, dataset, types.SimpleNamespace(extend=None, **chosen))
    assert capsys.readouterr().err == ""


def test_a_report_is_not_made_of_other_images_than_the_run(place, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("images", "run"):
        shutil.copytree(place / name, tmp_path / name)
    config = json.loads((tmp_path / "run" / "config.json").read_text(encoding="utf-8"))
    config["dataset"] = str(tmp_path / "images")
    (tmp_path / "run" / "config.json").write_text(json.dumps(config), encoding="utf-8")
    trained = next(
        x for x in folders.list_folder(tmp_path / "images")[0] if x.split == folders.TRAIN
    )
    (tmp_path / "images" / trained.path).unlink()
    assert run("report", tmp_path / "run") == 2
    assert "images has other training images or labels than" in capsys.readouterr().err


def test_a_finished_run_is_trained_for_longer_with_its_own_settings(place):
    parent = json.loads((place / "run" / "config.json").read_text(encoding="utf-8"))
    words = ["--init-from", str(place / "run"), "--extend", "3"]
    longer = settings.parse([*words, "--batch-size", "4"])
    assert longer.dataset == parent["dataset"] and longer.output == f"{place / 'run'}-extended"
    recipe = longer.training
    assert (recipe.epochs, recipe.schedule, recipe.warmup) == (3, "cosine", settings.WARMUP)
    assert (recipe.batch_size, recipe.learning_rate) == (4, parent["learning_rate"])


@pytest.mark.slow
def test_an_extended_run_names_its_parent_and_is_repeated_from_its_config(
    place, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    run_dir = tmp_path / "longer"
    words = ["--init-from", place / "run", "--extend=1", "--output"]
    assert run("train", *words, run_dir) == 0
    config = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))
    assert config["init_from"] == str(place / "run") and config["epochs"] == 1
    again = tmp_path / "again"
    assert run("train", "--config", run_dir / "config.json", "--output", again) == 0
    assert (run_dir / "history.csv").read_text() == (again / "history.csv").read_text()


def test_features_are_what_the_head_reads(place, model, capsys, tmp_path):
    (tmp_path / "broken.png").write_bytes(b"no image")
    paths = [place / "images" / "accuracy" / f"{i}.png" for i in (3, 1)]
    words = [*paths, tmp_path / "broken.png", "-o", tmp_path / "x" / "features.npz"]
    assert run("features", place / "run" / "model.keras", *words) == 1
    assert "broken.png cannot be read" in capsys.readouterr().err
    with np.load(tmp_path / "x" / "features.npz") as file:
        names, features = file["images"], file["features"]
    assert names.tolist() == [str(path) for path in paths] and features.dtype == "float32"
    images = np.stack([np.asarray(Image.open(path)) for path in paths])
    kernel, bias = model.get_layer("head").get_weights()
    np.testing.assert_allclose(
        features @ kernel + bias, model.predict(images, verbose=0), atol=1e-5
    )


def expected(model, path):
    logits = model.predict(np.asarray(Image.open(path))[None], verbose=0)[0].astype("float64")
    return dict(zip(model.class_names, np.exp(logits) / np.exp(logits).sum()))


def test_predictions_are_the_models(place, model, capsys):
    paths = [place / "images" / "accuracy" / "3.png", place / "images" / "blå" / "4.png"]
    assert run("predict", place / "run" / "model.keras", *paths, "--json") == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["image"] for row in rows] == [str(path) for path in paths]
    for row, path in zip(rows, paths):
        found = {pair["class"]: pair["probability"] for pair in row["predictions"]}
        assert found == pytest.approx(expected(model, path), abs=1e-5)
        assert list(found.values()) == sorted(found.values(), reverse=True)


def test_predictions_come_as_lines_and_as_a_table(place, model, capsys):
    path = place / "images" / "accuracy" / "3.png"
    assert run("predict", place / "run" / "model.keras", path) == 0
    line = capsys.readouterr().out
    best, probability = max(expected(model, path).items(), key=lambda pair: pair[1])
    assert line.startswith(f"{path}: {best} {probability:.1%}, ")
    folder = place / "images" / "accuracy"
    assert run("predict", place / "run" / "model.keras", folder, "--csv") == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert len(rows) == 25
    columns = ["class", "probability", "class_2", "probability_2", "class_3", "probability_3"]
    assert list(rows[0]) == ["image", *columns]
    row = next(row for row in rows if row["image"] == str(path))
    assert row["class"] == best and float(row["probability"]) == pytest.approx(probability)
    assert {row[name] for name in ("class", "class_2", "class_3")} == set(CLASSES)
    assert run("predict", place / "run", path, "--csv", "--top", "1") == 0  # A run directory.
    header, line = capsys.readouterr().out.split("\n")[:-1]
    assert header == "image,class,probability" and line.startswith(f"{path},{best},0.")


def test_lists_on_stdin_have_any_line_ends_any_bytes_and_folders(place, capsys, monkeypatch):
    folder = place / "images" / "blå"
    lines = f"\ufeff{folder}\r\n\r\n{folder / '4.png'}\n".encode() + b"gone-\xe9.png\r\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(lines), "ascii"))
    expected = [*map(str, visible(folder)), str(folder / "4.png"), os.fsdecode(b"gone-\xe9.png")]
    assert list(inputs._listed(["-"])) == expected


def test_a_folder_without_images_is_named(place, capsys, tmp_path):
    (tmp_path / "empty").mkdir()
    words = ["predict", place / "run" / "model.keras", tmp_path / "empty"]
    assert run(*words, place / "images" / "blå" / "4.png") == 1
    captured = capsys.readouterr()
    assert captured.err == f"error: {tmp_path / 'empty'} has no images\n"
    assert "4.png: " in captured.out


def test_json_is_json_whatever_stdout_can_express(monkeypatch):
    content = {"image": os.fsdecode(b"\xe9.png"), "class": "żółw 🐢"}
    for encoding in ("utf-8", "cp1252", "ascii"):
        stdout = io.TextIOWrapper(io.BytesIO(), encoding)
        monkeypatch.setattr(sys, "stdout", stdout)
        line = predict.as_json(content)
        assert json.loads(line.encode(encoding)) == content


def test_the_cache_is_shown_and_cleared(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "keras_vit").mkdir()
    for name in ("a.npy", "a.json", "b-digests.json"):
        (tmp_path / "keras_vit" / name).write_bytes(bytes(2**20))
    assert run("cache") == 0
    assert f"{tmp_path / 'keras_vit'}: 1 decoded set of images, 1.0 MiB" in capsys.readouterr().out
    assert run("cache", "--clear") == 0
    assert not list((tmp_path / "keras_vit").iterdir())


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(place, capsys, monkeypatch, tmp_path):
    broken, right = tmp_path / "broken.png", place / "images" / "accuracy" / "3.png"
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


def test_a_folder_that_cannot_be_listed_ends_a_command_with_one_line(place, capsys, monkeypatch):
    def denied(folder):
        raise PermissionError(13, "Permission denied", str(folder / "locked"))

    monkeypatch.setattr(inputs, "visible", denied)
    assert run("predict", place / "run" / "model.keras", place / "images") == 2
    message = f"error: {place / 'images' / 'locked'} cannot be read: Permission denied\n"
    assert capsys.readouterr().err == message


def test_hidden_files_are_not_looked_at(place, capsys, tmp_path):
    for name in (".git", "seen"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x.dat").write_text("no image")
    assert run("predict", place / "run" / "model.keras", tmp_path) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_a_model_without_names_is_measured_and_numbers_its_classes(
    place, model, capsys, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    nameless = VisionTransformer.from_config({**model.get_config(), "class_names": None})
    nameless.save(tmp_path / "model.keras")
    assert run("evaluate", tmp_path / "model.keras", "--dataset", place / "images") == 0
    assert run("predict", tmp_path / "model.keras", place / "images" / "accuracy" / "3.png") == 0
    assert re.search(r"3.png: [012] [\d.]+%, [012] ", capsys.readouterr().out)


def test_a_saved_model_is_measured_as_after_training(place, model, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    words = ["--dataset", place / "images", "-o", tmp_path / "out"]
    assert run("evaluate", place / "run" / "model.keras", *words) == 0
    found = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    metrics = json.loads((place / "run" / "metrics.json").read_text(encoding="utf-8"))
    for name in ("accuracy", "loss", "calibration_error", "per_class", "parameters"):
        assert found[name] == metrics[name]
    trained = sum(int(np.prod(weight.shape)) for weight in model.trainable_weights)
    assert found["parameters"] == trained
    assert f"Test accuracy {metrics['accuracy']:.2%}" in capsys.readouterr().out
    assert len(list((tmp_path / "out").glob("*.png"))) == 10
    lines = (tmp_path / "out" / "predictions.csv").read_bytes().decode()
    assert "\r" not in lines
    rows = list(csv.DictReader(io.StringIO(lines)))
    tested = [x.path for x in folders.list_folder(place / "images")[0] if x.split == "test"]
    assert [row["image"] for row in rows] == tested
    assert [row["true_class"] for row in rows] == [path.split("/")[0] for path in tested]
    right = [row["true_class"] == row["predicted_class"] for row in rows]
    assert np.mean(right) == pytest.approx(found["accuracy"])
    probabilities = {name: float(rows[0][f"probability_{name}"]) for name in CLASSES}
    assert probabilities == pytest.approx(expected(model, place / "images" / tested[0]), abs=1e-5)
    assert rows[0]["predicted_class"] == max(probabilities, key=probabilities.get)


def test_predictions_without_files_are_numbered_as_in_their_source(tmp_path):
    images, labels = np.zeros((2, 4, 4, 1), "uint8"), np.array([0, 1])
    dataset = data.Dataset("x", images, labels, images, labels, ["a", "b"], False)
    for indices, expected in ((None, ["0", "1"]), (np.array([3, 7]), ["3", "7"])):
        found = dataclasses.replace(dataset, test_indices=indices)
        evaluate.write_predictions(tmp_path / "x.csv", found, np.eye(2))
        rows = list(csv.DictReader(io.StringIO((tmp_path / "x.csv").read_text())))
        assert [row["image"] for row in rows] == expected


def test_a_model_is_measured_on_all_images_of_a_folder_that_it_has_not_seen(
    place, model, capsys, monkeypatch, tmp_path
):
    """Ten new photos, a class that it does not know, a file by another name, one that is gone."""
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    before = {x.path: x.split for x in folders.list_folder(place / "images")[0]}
    grown = shutil.copytree(place / "images", tmp_path / "grown")
    for index in range(100, 110):
        coloured(0, index).save(grown / "$_$" / f"{index}.png")
    trained = [path for path in before if before[path] == "train"]
    tested = [path for path in before if before[path] == "test"]
    (grown / "dog").mkdir()
    coloured(1, 200).save(grown / "dog" / "0.png")
    (grown / trained[0]).rename(grown / "blå" / "another name.png")
    (grown / tested[0]).unlink()
    words = ["--dataset", grown, "-o", tmp_path / "out"]
    assert run("evaluate", place / "run" / "model.keras", *words) == 0
    metrics = json.loads((tmp_path / "out" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["left_out"] == {
        "that the model was trained or validated on": len(trained),
        "of classes that the model was not trained on (dog)": 1,
    }
    count = len(tested) - 1 + 10
    assert sum(row["images"] for row in metrics["per_class"].values()) == count
    out = capsys.readouterr().out
    assert f"Measured on {count} of 85 images in {grown}, without {len(trained)} that the" in out
    images = [np.asarray(Image.open(grown / path)) for path in tested[1:]]
    images += [np.asarray(coloured(0, index)) for index in range(100, 110)]
    classes = [path.split("/")[0] for path in tested[1:]] + ["$_$"] * 10
    predicted = model.predict(np.stack(images), verbose=0).argmax(axis=1)
    right = [model.class_names[i] == name for i, name in zip(predicted, classes)]
    assert metrics["accuracy"] == pytest.approx(np.mean(right))


def test_features_are_probed_on_a_data_set_of_any_classes(
    place, places, model, capsys, monkeypatch, tmp_path
):
    monkeypatch.setattr(figures, "draw_all", lambda *_: None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    found = []
    for name in ("images", "others"):
        words = ["--dataset", places[name], "--probe", "-o", tmp_path / name]
        assert run("evaluate", place / "run", *words) == 0
        found.append(json.loads((tmp_path / name / "metrics.json").read_text(encoding="utf-8")))
    own, others = found
    tested = [x.split for x in folders.list_folder(place / "images")[0]].count("test")
    sizes = {"neighbours": 20, "train_images": 75 - tested, "test_images": tested}
    assert own["probe"] == {**own["probe"], **sizes} and own["probe"]["linear"] > 0.8
    assert "accuracy" in own and "accuracy" not in others
    assert others["probe"]["neighbours"] == others["probe"]["train_images"] < 10
    captured = capsys.readouterr()
    line = f"a linear probe has accuracy {own['probe']['linear']:.2%} and 20 nearest neighbours "
    assert line + f"{own['probe']['nearest_neighbours']:.2%} on {tested} test" in captured.out
    assert "only the features are measured: " in captured.err
    assert "differ from the folder's (a, b)" in captured.err


def test_some_classes_or_none_and_a_model_that_does_not_tell_what_it_saw(
    place, model, monkeypatch, tmp_path
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "new" / "blå").mkdir(parents=True)
    coloured(2, 100).save(tmp_path / "new" / "blå" / "0.png")
    size, names = (20, 24), model.class_names
    dataset, left_out = data.load_unseen(str(tmp_path / "new"), size, names, model.seen)
    assert dataset.test_labels.tolist() == [2] and left_out == {}
    np.testing.assert_array_equal(dataset.test_images[0], coloured(2, 100))
    files, _ = folders.list_folder(place / "images")
    tested = [file for file in files if file.split == "test"]
    dataset, left_out = data.load_unseen(str(place / "images"), size, names, ())
    assert [file.path for file in dataset.manifest] == [file.path for file in tested]
    assert list(left_out.values()) == [75 - len(tested)]
    seen = {file.digest[:SHORT] for file in files}
    with pytest.raises(data.DatasetError, match="only 75 that the model was trained or validated"):
        data.load_unseen(str(place / "images"), size, names, seen)


def test_explanations_are_drawn_for_each_image(place, model, capsys, tmp_path):
    images = [place / "images" / name / "3.png" for name in ("accuracy", "blå")]
    words = [*images, tmp_path / "gone.png", "-o", tmp_path / "out", "--html", "--target=blå"]
    assert run("explain", place / "run" / "model.keras", *words) == 1
    pictures = sorted(path.name for path in files.visible(tmp_path / "out"))
    pictures.append(next((tmp_path / "out").glob("*.html")).name)
    assert pictures == [
        *("3-attention-2.png", "3-attention.png", "3-classes-2.png", "3-classes.png"),
        "explorer.html",
    ]
    captured = capsys.readouterr()
    assert "gone.png cannot be read" in captured.err
    best, probability = max(expected(model, images[0]).items(), key=lambda pair: pair[1])
    assert (
        f"{images[0]}: {best} {probability:.0%}, {tmp_path / 'out' / '3-attention.png'}"
        in captured.out
    )
    target = expected(model, images[0])["blå"]
    picture = tmp_path / "out" / "3-classes.png"
    assert f"{images[0]}: blå {target:.0%}, {picture}\n" in captured.out
    assert "3.png: accuracy" in (tmp_path / "out" / "explorer.html").read_text(encoding="utf-8")


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
    content = exported_metadata(tmp_path / "new" / name, format)
    assert content["class_names"] == list(CLASSES)
    assert (content["input"]["height"], content["input"]["width"]) == (20, 24)
    kept = np.asarray(content["normalization"]["mean"])
    model = load_model(place / "run" / "model.keras")
    np.testing.assert_allclose(kept, model.get_layer("normalization").mean, rtol=1e-6)


def exported_metadata(path, format):
    """The metadata of an exported model, whose output is called `probabilities`."""
    if format == "onnx":
        import onnx

        exported = onnx.load(path)
        assert [output.name for output in exported.graph.output] == ["probabilities"]
        return {x.key: json.loads(x.value) for x in exported.metadata_props}
    if format == "saved_model":
        import tensorflow as tf

        served = tf.saved_model.load(str(path)).signatures["serving_default"]
        assert list(served.structured_outputs) == ["probabilities"]
        return json.loads((path / "assets.extra" / "metadata.json").read_text(encoding="utf-8"))
    from ai_edge_litert.interpreter import Interpreter

    signature = Interpreter(model_path=str(path)).get_signature_list()["serving_default"]
    assert signature["outputs"] == ["probabilities"]
    with zipfile.ZipFile(path) as archive:
        return json.loads(archive.read("metadata.json"))


@pytest.mark.parametrize("name", ["timm/model.safetensors", "keras/model.keras"])
def test_weights_are_exported_and_predict_the_same(name, place, capsys, tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the command runs on TensorFlow")
    file, image = tmp_path / name, place / "images" / "accuracy" / "3.png"
    words = ["--format", name.split("/")[0], "-o", file]
    assert run("export", place / "run" / "model.keras", *words) == 0
    assert "largest difference of a probability on 256 images of noise" in capsys.readouterr().out
    answers = []
    for source in (file, place / "run"):
        assert run("predict", source, image, "--json") == 0
        answers.append(json.loads(capsys.readouterr().out)["predictions"])
    for ours, theirs in zip(*answers):
        assert ours["class"] == theirs["class"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=2e-3)


@pytest.mark.parametrize("format", ["timm", "saved_model"])
def test_a_model_trained_in_bfloat16_is_exported_in_float32(format, model, tmp_path):
    if keras.backend.backend() != "tensorflow":
        pytest.skip("the command runs on TensorFlow")
    mixed = VisionTransformer.from_config({**model.get_config(), "dtype": "mixed_bfloat16"})
    mixed.set_weights([10 * weight for weight in model.get_weights()])
    mixed.save(tmp_path / "model.keras")
    name = "model.safetensors" if format == "timm" else "saved"
    words = ["--format", format, "-o", tmp_path / name]
    assert run("export", tmp_path / "model.keras", *words) == 0


def test_what_is_exported_takes_pixels_and_gives_probabilities(model):
    from keras_vit.export import served

    images = np.random.default_rng(1).integers(0, 256, (5, 20, 24, 3))
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


def test_a_frozen_model_is_exported_as_well(model):
    from keras_vit.export import served

    model = VisionTransformer.from_config(model.get_config())
    model.trainable = False
    images = np.zeros((1, 20, 24, 3))
    assert served(model).predict(images, verbose=0).sum() == pytest.approx(1)


def test_an_export_that_answers_otherwise_is_an_error(place, model, capsys, monkeypatch, tmp_path):
    from keras_vit import export, prediction

    if keras.backend.backend() != "tensorflow":
        pytest.skip("the command runs on TensorFlow")

    def wrong(images):
        return prediction.predict(model, images) + 0.002

    monkeypatch.setattr(export, "write", lambda *_: None)
    monkeypatch.setattr(export, "add_metadata", lambda *_: None)
    monkeypatch.setattr(export, "runner", lambda *_: wrong)
    words = ["--format", "saved_model", "-o", tmp_path / "model"]
    assert run("export", place / "run" / "model.keras", *words) == 1
    assert "differs from Keras by more than 0.001" in capsys.readouterr().err


def test_images_of_four_channels_are_measured_predicted_and_explained(capsys, tmp_path):
    """`evaluate`, `predict` and `explain` take what `train` takes."""
    random = np.random.default_rng(0)
    images, labels = random.integers(0, 256, (6, 8, 8, 4)).astype("uint8"), np.arange(6) % 2
    arrays = {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}
    np.savez(tmp_path / "set.npz", **arrays)
    Image.fromarray(images[0], "RGBA").save(tmp_path / "0.png")
    model = VisionTransformer((8, 8, 4), 2, depth=1, embed_dim=8, num_heads=1, resize="crop")
    model.save(tmp_path / "model.keras")
    words = [tmp_path / "model.keras", tmp_path / "0.png"]
    assert run("evaluate", words[0], "--dataset", tmp_path / "set.npz") == 0
    assert run("explain", *words, "-o", tmp_path / "out", "--html") == 0
    capsys.readouterr()
    assert run("predict", *words, "--json") == 0
    pairs = json.loads(capsys.readouterr().out)["predictions"]
    logits = model.predict(images[:1], verbose=0)[0].astype("float64")
    expected = np.exp(logits) / np.exp(logits).sum()
    found = {pair["class"]: pair["probability"] for pair in pairs}
    assert [found["0"], found["1"]] == pytest.approx(expected, abs=1e-6)


WRONG = {
    "": "the following arguments are required: COMMAND",
    "fly": "invalid choice: 'fly'",
    "predict": "required: MODEL, IMAGE",
    "predict missing.keras x.png": "missing.keras cannot be read: No such file or directory",
    "predict model.h5 x.png": "model.h5 is neither a .keras or .safetensors file nor a preset: the",
    "train --dataset {images} --init-from cifar10-huge": "--init-from cifar10-huge is neither a .k",
    "train --dataset {images} --init-from {model} --depth 9": (
        "--depth 9 differs from --init-from {model}, which has 2: leave it out"
    ),
    "train --dataset {images} --init-from {deep}": (
        "takes images of 5 channels, but those of images have 3"
    ),
    "train --dataset {images} --init-from {model} --freeze 3": "Received: freeze=3",
    "train --dataset {images} --recipe finetune": "--recipe finetune needs --init-from: a preset s",
    "train --dataset {images} --extend 3": "--extend 3 needs the directory of a finished run, as",
    "train --init-from {model} --extend 3": "--extend 3 needs the directory of a finished run, as",
    "predict {model} x.png --json --csv": "not allowed with argument",
    "export {model} --format onnx -o model": "--format onnx must end in .onnx",
    "predict {model} x.png --top 0": "--top must be at least 1, but is 0",
    "predict {images} x.png": "images is a folder. It holds no model.keras.",
    "export {model} --format torch -o x": "one of onnx, saved_model, litert, keras, timm, not",
    "page {model} -o page": "--output must end in .html, but is page",
    "page {model} -o x.html --dataset digits": (
        "takes images of shape (20, 24, 3), but those of digits have (32"
    ),
    "predict {deep} x.png": "takes images of 5 channels: expected one of 1, 3 or 4",
    "predict {net} x.png": "holds a Sequential, not a VisionTransformer",
    "export {net} --format saved_model -o x": "holds a Sequential, not a VisionTransformer",
    "explain {net} x.png -o x": "holds a Sequential, not a VisionTransformer",
    "evaluate {model} --dataset {images} -o {run}": "holds a run, whose metrics would be lost",
    "explain {model} x.png": "required: -o/--output",
    "features {model} x.png -o x.csv": "--output must end in .npz, but is x.csv",
    "explain {model} {images}/blå -o {images}/accuracy": "accuracy holds 0.png, beside which pic",
    "explain {model} x.png -o x --target dog": "one of $_$, accuracy, blå, not 'dog'\n",
    "evaluate {model} --dataset {images} -o {images}/accuracy": "holds images of --dataset",
    "evaluate {model} --dataset digits": (
        "The model's classes ($_$, accuracy, blå) differ from those of digits (0, 1, 2, 3, 4, "
        "...).\n"
    ),
    "evaluate {model} --dataset missing.npz": "missing.npz cannot be read",
    "evaluate {model} --dataset {others}": (
        "The model's classes ($_$, accuracy, blå) differ from the folder's (a, b).\n"
    ),
    "evaluate {model} --dataset {tests} --probe": "--probe needs training and test images, but",
    "train --dataset {images} --image-size 15": (
        "error: --patch-size must divide the image side of 15 pixels, but is 4. Try --image-size "
        "12 or 16, or --patch-size 5\n"
    ),
    "train --dataset {empty}": "has no images in sub-folders",
    "train --dataset digits --image-size 16": "is only for folders of images",
    "train --dataset {empty} --image-size 50": "Try --image-size 48 or 52, or --patch-size 5 or",
}


@pytest.fixture(scope="module")
def places(place, tmp_path_factory):
    """What `WRONG` names in braces."""
    root = tmp_path_factory.mktemp("wrong")
    (root / "empty").mkdir()
    for name in ("a", "b"):
        (root / "others" / name).mkdir(parents=True)
        for index in range(5):
            image = Image.fromarray(np.full((9, 9, 3), 5 * "ab".index(name) + index, "uint8"))
            image.save(root / "others" / name / f"{index}.png")
    np.savez(root / "tests.npz", x_test=np.zeros((2, 20, 24, 3), "uint8"), y_test=[0, 1])
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)]).save(root / "net.keras")
    VisionTransformer((8, 8, 5), depth=1, embed_dim=8, num_heads=1).save(root / "deep.keras")
    return {
        **{"empty": root / "empty", "others": root / "others", "tests": root / "tests.npz"},
        **{"net": root / "net.keras", "deep": root / "deep.keras"},
        **{"run": place / "run", "model": place / "run" / "model.keras"},
        "images": place / "images",
    }


@pytest.mark.parametrize("words", WRONG)
def test_what_is_wrong_is_said_in_one_line(words, place, places, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
    monkeypatch.chdir(tmp_path)
    assert run(*words.format(**places).split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    assert WRONG[words].format(**places) in captured.err


def test_help_answers_without_importing_keras():
    for words in (["--help"], ["predict", "--help"], ["train", "--help"]):
        timed = subprocess.run(
            [sys.executable, "-X", "importtime", "-m", "keras_vit_cli", *words],
            capture_output=True,
            text=True,
        )
        assert timed.returncode == 0
        assert "usage: keras-vit" in timed.stdout
        assert " keras\n" not in timed.stderr and " numpy\n" not in timed.stderr


def test_a_page_begins_with_the_test_images_of_the_run(place, capsys, tmp_path):
    model, output = place / "run" / "model.keras", tmp_path / "new" / "page.html"
    assert run("page", model, "-o", output) == 0
    assert re.search(r"page.html, 0.1 MB, with 12 test images of", capsys.readouterr().out)
    labels = re.findall(r'<button type="button".*title="([^"]*)"', output.read_text("utf-8"))
    assert {name: labels.count(name) for name in CLASSES} == {"$_$": 6, "accuracy": 4, "blå": 2}
    # Away from its run, a model begins without images.
    alone = tmp_path / "model.keras"
    shutil.copy(model, alone)
    assert run("page", alone, "-o", output) == 0
    assert "with no images" in capsys.readouterr().out
    # Where the run's images are gone, too, and the page says so.
    config = json.loads((place / "run" / "config.json").read_text(encoding="utf-8"))
    changed = {**config, "dataset": str(tmp_path / "gone")}
    (tmp_path / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    assert run("page", alone, "-o", output) == 0
    assert "begins without images: " in capsys.readouterr().err
