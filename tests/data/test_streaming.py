"""Folders that do not fit into the cache are read as they are needed, with the same result."""

import collections
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import threading
import types

import keras
import numpy as np
import pytest
from PIL import Image

from keras_vit import training
from keras_vit.data import (
    Batches,
    DatasetError,
    ImageError,
    StreamedImages,
    load_dataset,
    streaming,
)
from keras_vit.data import cache as image_cache
from keras_vit.data.batches import AHEAD, batches_of
from keras_vit.data.dataset import digest
from keras_vit.reporting.metrics import flip_averaged_accuracy
from keras_vit.training.journal import Interrupted, Journal
from keras_vit_cli import main
from keras_vit_cli.recipes import Recipe

ROOT = pathlib.Path(__file__).resolve().parents[2]
SIZES = {"patch_size": 8, "embed_dim": 8, "mlp_dim": 8, "num_heads": 2, "depth": 1}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """120 photos of different sizes in three classes, and a broken one, to be read at 16x16."""
    folder = tmp_path_factory.mktemp("photos")
    for number, name in enumerate(("a", "b", "c")):
        for index in range(40):
            random = np.random.default_rng([number, index])
            pixels = random.integers(0, 256, (18 + index % 3, 20, 3)).astype("uint8")
            path = folder / "train" / name / f"{index}.{'jpg' if index % 2 else 'png'}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
        (folder / "test" / name).mkdir(parents=True)
        for index in range(5):
            shutil.move(
                folder / "train" / name / f"{index}.{'jpg' if index % 2 else 'png'}",
                folder / "test" / name,
            )
    (folder / "train" / "b" / "7.jpg").write_bytes(b"no image")
    return folder


def loaded(monkeypatch, folder, gib, cache="cache"):
    """The `Dataset` of a folder at 16x16, with a cache of so many GiB."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder.with_name(f"{cache}-of-{folder.name}-{gib}")))
    monkeypatch.setenv("KERAS_VIT_CACHE_GIB", gib)
    return load_dataset(str(folder), image_size=16)


@pytest.fixture
def both(monkeypatch, folder):
    """The same data twice: in memory, and streamed."""
    return [loaded(monkeypatch, folder, gib) for gib in ("1", "0")]


def test_a_streamed_folder_is_the_same_data_set_as_in_memory(both, capsys, folder, monkeypatch):
    in_memory, streamed = both
    assert isinstance(in_memory.train_images, np.ndarray)
    for name in ("train_images", "test_images"):
        images = getattr(streamed, name)
        assert isinstance(images, StreamedImages)
        np.testing.assert_array_equal(images[:], getattr(in_memory, name))
    np.testing.assert_array_equal(streamed.train_labels, in_memory.train_labels)
    assert streamed.manifest == in_memory.manifest
    assert streamed.image_shape == in_memory.image_shape == (16, 16, 3)
    assert len(streamed.train_labels) == 104  # Without the broken one.
    capsys.readouterr()
    loaded(monkeypatch, folder, "0")
    out, err = capsys.readouterr()
    assert "left out train/b/7.jpg: cannot identify image file" in err
    assert "Checking" not in out and "are read as they are needed" in out


def test_batches_of_a_streamed_folder_equal_those_in_memory(both):
    for parts in zip(*(dataset.for_training(20, 64, seed=1) for dataset in both)):
        in_memory, streamed = [
            (x.train_images, x.train_labels) if hasattr(x, "train_images") else x for x in parts
        ]
        assert isinstance(streamed[0], StreamedImages)
        pair = [batches_of(*data, batch_size=24, seed=3) for data in (in_memory, streamed)]
        for epoch, skipped in ((1, 0), (2, 0), (2, 1)):
            for batches in pair:
                batches.start_epoch(epoch, skipped)
            assert pair[0].num_batches == pair[1].num_batches
            for index in range(pair[0].num_batches):
                for ours, theirs in zip(pair[1][index], pair[0][index], strict=True):
                    np.testing.assert_array_equal(ours, theirs)


def test_the_digest_of_a_streamed_folder_needs_no_pixels(both, monkeypatch):
    in_memory, streamed = both
    monkeypatch.setattr(StreamedImages, "__getitem__", None)
    assert digest(streamed) == digest(in_memory)
    limited = [dataset.limit_train(30, seed=0) for dataset in both]
    assert digest(limited[0]) == digest(limited[1]) != digest(in_memory)


@pytest.mark.parametrize(
    "key",
    [
        *(3, -1, np.int64(2), slice(2, 7), slice(None, None, -1), [4, 4, 0]),
        np.array([5, 1, 5]),
        np.arange(9) % 2 == 0,
        np.empty(0, int),
    ],
    ids=str,
)
def test_streamed_images_are_indexed_like_an_array(key):
    array = np.random.default_rng(0).integers(0, 256, (9, 4, 4, 3)).astype("uint8")
    images = StreamedImages(array.__getitem__, array.shape)
    np.testing.assert_array_equal(images[key], array[key])
    assert images[key].dtype == np.uint8
    if np.ndim(array[key]) == 4:
        np.testing.assert_array_equal(images.subset(key)[:], array[key])
        turned = images.subset(slice(None, None, -1)).subset(key)
        assert turned.shape == array[key].shape and turned.nbytes == array[key].nbytes
        np.testing.assert_array_equal(turned[:], array[::-1][key])
    with pytest.raises(IndexError):
        images[9]


def test_each_image_is_read_once_an_epoch_and_never_more_than_the_next_batches():
    read, lock = collections.Counter(), threading.Lock()

    def image(row):
        with lock:
            read[row] += 1
        return np.full((2, 2, 3), row, "uint8")

    batches = Batches(StreamedImages(image, (40, 2, 2, 3)), np.arange(40), 4, seed=0)
    for epoch in (1, 2):
        batches.start_epoch(epoch)
        for index in range(batches.num_batches):
            images, labels = batches[index]
            np.testing.assert_array_equal(images[:, 0, 0, 0], labels)
            assert sum(read.values()) <= 40 * (epoch - 1) + 4 * (index + 1 + AHEAD)
        assert read == dict.fromkeys(range(40), epoch)


def test_an_order_that_was_given_up_leaves_no_images_behind():
    images = StreamedImages(lambda row: np.full((2, 2, 3), row, "uint8"), (40, 2, 2, 3))
    batches = Batches(images, np.arange(40), 4, seed=0)
    for epoch in range(1, 6):
        batches.start_epoch(epoch)
        for _ in batches[0], batches[1]:
            assert len(images._ahead) <= 4 * AHEAD
    for index in range(batches.num_batches):
        np.testing.assert_array_equal(batches[index][0][:, 0, 0, 0], batches[index][1])


def test_holding_out_of_a_memory_mapped_set_copies_nothing(monkeypatch, folder):
    monkeypatch.setattr(image_cache, "IN_MEMORY", 100)
    mapped = loaded(monkeypatch, folder, "1")
    assert isinstance(mapped.train_images, np.memmap)
    data, (images, labels) = mapped.hold_out(20, seed=0)
    whole = np.array(mapped.train_images)
    assert isinstance(data.train_images, StreamedImages) and isinstance(images, StreamedImages)
    np.testing.assert_array_equal(
        np.sort(np.concatenate([data.train_images[:], images[:]]), axis=0), np.sort(whole, axis=0)
    )
    rows = [np.flatnonzero((whole == image).all(axis=(1, 2, 3)))[0] for image in images[:]]
    np.testing.assert_array_equal(mapped.train_labels[rows], labels)


def test_flipped_predictions_are_those_of_flipped_images(both):
    """A model whose logits are the colours of an image's upper left pixel."""
    images = both[0].test_images
    model = types.SimpleNamespace(
        input_shape=(None, 16, 16, 3),
        output_shape=(None, 3),
        predict_on_batch=lambda batch: batch[:, 0, 0].astype("float32"),
    )
    zeros = np.zeros((len(images), 3))
    labels = images[:, 0, -1].argmax(axis=1)
    assert (images[:, 0, 0].argmax(axis=1) != labels).any()
    for dataset in both:
        assert flip_averaged_accuracy(model, dataset.test_images, labels, zeros) == 1


@pytest.mark.parametrize("most", [16, 2**31], ids=["a sample", "all"])
def test_normalization_depends_on_the_images_and_not_on_where_they_are(most, both, monkeypatch):
    monkeypatch.setattr(streaming, "LARGEST_ADAPTED", most)
    monkeypatch.setattr(streaming, "SAMPLE", 50)
    means = []
    for dataset in both:
        layer = training.build_model(dataset, Recipe(**SIZES)).get_layer("normalization")
        means.append(keras.ops.convert_to_numpy(layer.mean).ravel())
    np.testing.assert_array_equal(*means)
    exact = both[0].train_images.mean(axis=(0, 1, 2))
    assert np.allclose(means[0], exact, rtol=1e-5) == (most > 16)
    np.testing.assert_allclose(means[0], exact, atol=3)


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() == "torch", reason="does not resume bit for bit")
def test_a_streamed_run_resumed_inside_an_epoch_equals_one_in_memory(both, monkeypatch, tmp_path):
    recipe, states = Recipe(**SIZES, epochs=2, batch_size=16, dropout=0.2), []

    def train(dataset, run_dir):
        run_dir.mkdir(exist_ok=True)
        dataset, validation = dataset.for_training(8, None, seed=0)
        keras.utils.set_random_seed(0)
        model = training.build_model(dataset, recipe)
        training.fit(model, dataset, recipe, 0, validation, run_dir)
        return model.get_weights(), (run_dir / "history.csv").read_text()

    class Stopper(Journal):
        def on_train_batch_end(self, batch, logs=None):
            if (self.epoch, batch) == (1, 3) and not self.skipped:
                os.kill(os.getpid(), signal.SIGTERM)
            super().on_train_batch_end(batch, logs)

    in_memory, streamed = both
    states.append(train(in_memory, tmp_path / "memory"))
    with monkeypatch.context() as patch:
        patch.setattr(training.fitting, "Journal", Stopper)
        with pytest.raises(Interrupted, match="epoch 2, batch 4"):
            train(streamed, tmp_path / "streamed")
    states.append(train(streamed, tmp_path / "streamed"))
    assert states[0][1] == states[1][1]
    for ours, theirs in zip(states[1][0], states[0][0], strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_photo_that_vanishes_during_training_is_named(capsys, folder, monkeypatch, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("KERAS_VIT_CACHE_GIB", "0")
    monkeypatch.setenv("KERAS_BACKEND", keras.backend.backend())
    fit = training.fit

    def with_a_photo_less(*arguments):
        (copy / "train" / "c" / "30.png").unlink()
        return fit(*arguments)

    monkeypatch.setattr(training, "fit", with_a_photo_less)
    sizes = [f"--{name.replace('_', '-')}={size}" for name, size in SIZES.items()]
    words = [f"--dataset={copy}", f"--output={tmp_path / 'run'}", "--image-size=16", "--epochs=1"]
    assert main.main(["train", *sizes, *words]) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert re.fullmatch(r"error: .*/train/c/30\.png cannot be read any more: .*", error)


def test_an_error_of_reading_reaches_whoever_asked():
    def read(row):
        raise ImageError(f"image {row}")

    batches = Batches(StreamedImages(read, (8, 2, 2, 3)), np.arange(8), 4, seed=0)
    with pytest.raises(ImageError, match="image"):
        batches[0]


@pytest.mark.parametrize("limit", ["-1", "20G", "nan", "inf"])
def test_a_wrong_size_of_the_cache_is_named(limit, folder, monkeypatch):
    with pytest.raises(DatasetError, match=f"number of GiB.*KERAS_VIT_CACHE_GIB={limit}$"):
        loaded(monkeypatch, folder, limit)


def test_what_the_disk_has_no_room_for_is_streamed(capsys, folder, monkeypatch):
    full = shutil.disk_usage("/")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    dataset = loaded(monkeypatch, folder, "20", cache="full")
    assert isinstance(dataset.train_images, StreamedImages)
    assert "more than what is free in" in capsys.readouterr().out


MEMORY = """
import pathlib, sys
import numpy as np
from keras_vit.data import Batches, load_dataset

def resident():
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20

dataset = load_dataset(sys.argv[1], image_size=512)
batches = Batches(dataset.train_images, dataset.train_labels, 16, seed=0)
for epoch in range(1, 5):
    batches.start_epoch(epoch)
    for images, labels in batches:
        pass
    print("MiB", dataset.train_images.nbytes / 2**20, resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_stays_flat_while_epochs_are_streamed(folder, tmp_path):
    many = tmp_path / "many"
    for path in folder.rglob("*/*/*.*"):
        for copy in range(6):  # 700 images, of 525 MiB at 512x512.
            target = many / path.relative_to(folder).parent / f"{copy}-{path.name}"
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.name != "7.jpg":
                Image.open(path).rotate(copy).save(target)
    environment = {
        **os.environ,
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
        "KERAS_VIT_CACHE_GIB": "0",
        "KERAS_BACKEND": keras.backend.backend(),
    }
    words = [sys.executable, "-c", MEMORY, str(many)]
    printed = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, check=True
    ).stdout
    rows = [x.split() for x in printed.decode().splitlines() if x.startswith("MiB ")]
    sizes = [float(size) for *_, size in rows]
    assert len(rows) == 4 and float(rows[0][1]) > 400
    assert max(sizes) - min(sizes) < 60
