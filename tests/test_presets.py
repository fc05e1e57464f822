"""Pretrained weights: the presets of the package, other classes, other sizes, half precision."""

import hashlib
import json
import zipfile

import h5py
import keras
import numpy as np
import pytest
from conftest import cifar10_on_disk
from test_model import SIZES, make_model, predict, random_images

import keras_vit
from keras_vit import presets
from keras_vit.loading import ModelError
from keras_vit.transfer import adapted, grid, resampled_positions

NAMES = ["a", "b", "c", "d", "e"]


def positions_of(model):
    return keras.ops.convert_to_numpy(model.get_layer("position_embedding").position)


@pytest.fixture(scope="module", params=["token", "mean"])
def model(request):
    return make_model(pooling=request.param, class_names=NAMES)


@pytest.fixture(scope="module")
def images():
    return random_images(7, 6, *SIZES["image_shape"])


def test_a_preset_starts_as_the_model_that_it_was(model, images, tmp_path):
    model.save(tmp_path / "model.keras")
    again = keras_vit.VisionTransformer.from_preset(tmp_path / "model.keras")
    np.testing.assert_allclose(predict(again, images), predict(model, images), atol=1e-6)
    assert again.class_names == tuple(NAMES)


def test_other_classes_get_a_new_head_that_starts_at_zero(model, images):
    for new in (adapted(model, 3), adapted(model, class_names=["x", "y", "z"])):
        np.testing.assert_array_equal(predict(new, images), np.zeros((6, 3)))
        np.testing.assert_allclose(new.features(images), model.features(images), atol=1e-6)
    assert model.features(images[:0]).shape == (0, model.features(images).shape[1])
    assert adapted(model, 3).class_names is None
    assert adapted(model, class_names=list("vwxyz")).class_names == tuple("vwxyz")
    assert not predict(adapted(model, class_names=list("vwxyz")), images).any()


def test_another_image_size_interpolates_the_positions_and_keeps_everything_else(model):
    with pytest.raises(ValueError, match="Received: image_shape=64"):
        adapted(model, image_shape=64)
    new = adapted(model, image_shape=(16, 24, 3))
    assert grid(new) == (4, 6) and new.input_shape == (None, 16, 24, 3)
    before, after = positions_of(model), positions_of(new)
    count = 4 * 6
    np.testing.assert_array_equal(after[:, :-count], before[:, :-4])  # The class token's own.
    old, resized = before[0, -4:].reshape(2, 2, -1), after[0, -count:].reshape(4, 6, -1)
    # Half a patch from the edge, the nearest patch alone counts; between two centers, both do.
    np.testing.assert_allclose(resized[0, 0], old[0, 0], atol=1e-6)
    np.testing.assert_allclose(resized[-1, -1], old[1, 1], atol=1e-6)
    np.testing.assert_allclose(
        resized[0, 2], old[0, 0] * 2 / 3 + old[0, 1] / 3, atol=1e-6
    )  # Patch center 2.5 / 6 lies at 1/3 of the way from 1/4 to 3/4.
    crop = next(x for x in new.augmentation if isinstance(x, keras_vit.RandomResizedCrop))
    assert (crop.height, crop.width) == (16, 24)
    for name in ("normalization", "patch_embedding", "block_2_mlp_output", "head"):
        for one, other in zip(model.get_layer(name).weights, new.get_layer(name).weights):
            np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_positions_of_the_same_grid_are_exactly_the_same():
    table = np.random.default_rng(0).normal(size=(1, 10, 4)).astype("float32")
    assert resampled_positions(table, (3, 3), (3, 3)) is table
    # A constant stays one, whatever the size.
    flat = np.full((1, 1 + 9, 4), 2.0, "float32")
    np.testing.assert_allclose(resampled_positions(flat, (3, 3), (2, 7)), 2.0, atol=1e-6)


def test_augmentation_dtype_and_trainability_are_the_callers(model, images):
    frozen = adapted(model)
    frozen.get_layer("patch_embedding").trainable = False
    new = adapted(frozen, augmentation=[], dtype="mixed_bfloat16")
    assert new.augmentation == []
    assert new.get_layer("patch_embedding").trainable
    assert new.get_layer("norm").compute_dtype == "bfloat16"
    np.testing.assert_allclose(predict(new, images), predict(model, images), atol=0.3)


def test_what_does_not_suit_a_preset_is_refused(model):
    with pytest.raises(ValueError, match=r"image_shape=\(8, 8, 1\)"):
        adapted(model, image_shape=(8, 8, 1))
    with pytest.raises(ValueError, match="patch_size"):
        adapted(model, image_shape=(10, 10, 3))
    with pytest.raises(ValueError, match="class_names"):
        adapted(model, num_classes=3, class_names=["a"])
    for name in ("cifar10-huge", "../cifar10-quick", "model.h5"):
        with pytest.raises(ModelError, match="cifar10-quick"):
            presets.load_preset(name)


def test_half_precision_rounds_matrices_alone_and_drops_the_optimizer(model, images, tmp_path):
    model.compile("adam", "mse")
    path = tmp_path / "half.keras"
    presets.write_preset(model, path)
    with zipfile.ZipFile(path) as archive:
        with archive.open(presets.WEIGHTS) as content, h5py.File(content) as file:
            kinds = {}
            file.visititems(
                lambda name, x: (
                    kinds.setdefault(x.ndim > 1, set()).add(x.dtype.name)
                    if isinstance(x, h5py.Dataset)
                    else None
                )
            )
        assert not json.loads(archive.read("config.json")).get("compile_config")
    assert kinds[True] == {"float16"} and "float16" not in kinds[False]
    half = presets.load_preset(path)
    for one, other in zip(model.weights, half.weights, strict=True):
        expected = one.numpy()
        expected = expected.astype("float16") if expected.ndim > 1 else expected
        np.testing.assert_array_equal(other.numpy(), expected.astype(other.numpy().dtype))
    first = path.read_bytes()
    model.get_layer("head").kernel.assign(np.full((16, 5), 1e6))
    with pytest.raises(ValueError, match="float16"):
        presets.write_preset(model, path)
    assert path.read_bytes() == first  # The file of before is intact.


def test_the_presets_are_small_and_described_and_intact():
    assert list(keras_vit.list_presets())
    sums = (presets.FOLDER / "SHA256SUMS").read_text().splitlines()
    sums = {name: digest for digest, name in (line.split("  ") for line in sums)}
    size = 0
    for name, card in keras_vit.list_presets().items():
        model = presets.load_preset(name)
        assert card.startswith(f"# {name}\n") and "`python train.py" in card
        assert model.input_shape == (None, 32, 32, 3) and len(model.class_names) == 10
        content = (presets.FOLDER / f"{name}.keras").read_bytes()
        assert hashlib.sha256(content).hexdigest() == sums[f"{name}.keras"]
        size += len(content)
    assert size <= 8e6


@pytest.mark.slow
@pytest.mark.parametrize("name", presets.list_presets())
def test_the_accuracy_of_a_preset_is_the_one_in_its_card(name):
    dataset = cifar10_on_disk()
    model = presets.load_preset(name)
    logits = model.predict(dataset.test_images, batch_size=500, verbose=0)
    accuracy = (logits.argmax(axis=1) == dataset.test_labels).mean()
    stated = presets.list_presets()[name].split("| accuracy | ")[1].split(" %")[0]
    assert 100 * accuracy == pytest.approx(float(stated), abs=0.02)
