"""TrivialAugment against Pillow; MixUp, CutMix and label smoothing against the formulas."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from PIL import Image, ImageEnhance, ImageOps

from keras_vit import (
    LabelSmoothingCrossentropy,
    MixUpCutMix,
    TrivialAugment,
    VisionTransformer,
    load_model,
)
from keras_vit.layers.trivial_augment import KINDS, distort


def to_numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def random_images(seed, *shape):
    return np.random.default_rng(seed).integers(0, 256, shape).astype("uint8")


def photo(seed, height=32, width=40):
    """A smooth image, for which resampling errors are meaningful."""
    small = random_images(seed, 5, 6, 3)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.BICUBIC))


def one_distorted(image, name, strength):
    kind = np.array([KINDS.index(name)])
    strengths = np.array([strength], "float32")
    return to_numpy(distort(image[None], kind, strengths, TrivialAugment().backend))[0]


# TrivialAugment


def affine(image, *matrix):
    return image.transform(image.size, Image.AFFINE, matrix, Image.BILINEAR)


def about_the_centre(image, a, b, d, e):
    """Pillow's matrix, whose origin is the corner of the image."""
    x, y = image.width / 2, image.height / 2
    return affine(image, a, b, x - a * x - b * y, d, e, y - d * x - e * y)


EVEN = np.full((32, 40, 3), 9, "uint8")
BY_PILLOW = {
    "identity": lambda image, s: image,
    "shear_x": lambda image, s: about_the_centre(image, 1, 0.99 * s, 0, 1),
    "shear_y": lambda image, s: about_the_centre(image, 1, 0, 0.99 * s, 1),
    "translate_x": lambda image, s: affine(image, 1, 0, 32 * s, 0, 1, 0),
    "translate_y": lambda image, s: affine(image, 1, 0, 0, 0, 1, 32 * s),
    "rotate": lambda image, s: image.rotate(135 * s, Image.BILINEAR),
    "brightness": lambda image, s: ImageEnhance.Brightness(image).enhance(1 + 0.99 * s),
    "color": lambda image, s: ImageEnhance.Color(image).enhance(1 + 0.99 * s),
    "contrast": lambda image, s: ImageEnhance.Contrast(image).enhance(1 + 0.99 * s),
    "sharpness": lambda image, s: ImageEnhance.Sharpness(image).enhance(1 + 0.99 * s),
    "posterize": lambda image, s: ImageOps.posterize(image, 8 - round(6 * abs(s))),
    "solarize": lambda image, s: ImageOps.solarize(image, 255 * (1 - abs(s))),
    "autocontrast": lambda image, s: ImageOps.autocontrast(image),
    "equalize": lambda image, s: ImageOps.equalize(image),
}


STRENGTHS = (-0.9, -0.25, 0.5, 1.0)


@pytest.fixture(scope="module")
def distorted():
    """Every kind at every strength, in one batch: for a photo and a uniform image."""
    kinds = np.repeat(np.arange(len(KINDS)), len(STRENGTHS))
    strengths = np.tile(STRENGTHS, len(KINDS)).astype("float32")
    shape = (len(KINDS), len(STRENGTHS), 32, 40, 3)
    backend = TrivialAugment().backend
    images = [np.repeat(image[None], len(kinds), axis=0) for image in (photo(0), EVEN)]
    return [to_numpy(distort(batch, kinds, strengths, backend)).reshape(shape) for batch in images]


@pytest.mark.parametrize("name", KINDS)
def test_each_transformation_agrees_with_pillow(name, distorted):
    """Pillow rounds pixels after each step, and does not blend with the black outside."""
    found, even = (batch[KINDS.index(name)] for batch in distorted)
    for index, strength in enumerate(STRENGTHS):
        expected = np.asarray(BY_PILLOW[name](Image.fromarray(photo(0)), strength))
        difference = np.abs(found[index] - expected)
        if name in ("shear_x", "shear_y", "rotate", "translate_x", "translate_y"):
            # Where a uniform image is unchanged, no pixel came from outside.
            assert difference[even[index] == EVEN].max(initial=0) < 2
            assert np.percentile(difference, 80) < 1.5
        else:
            assert difference.max() < 1.6


def test_an_image_translated_out_of_the_frame_is_black():
    assert not one_distorted(random_images(2, 32, 32, 3), "translate_x", 1.0).any()


def test_autocontrast_leaves_a_uniform_image_unchanged():
    flat = np.full((32, 32, 3), 77, "uint8")
    for name in ("autocontrast", "equalize", "contrast", "sharpness"):
        np.testing.assert_allclose(one_distorted(flat, name, 0.8), flat, atol=1e-3)


def test_kinds_and_strengths_are_uniformly_distributed(monkeypatch):
    seen = {}

    def noted(images, kind, strength, backend):
        seen.update(kind=to_numpy(kind), strength=to_numpy(strength))
        return images

    monkeypatch.setattr("keras_vit.layers.trivial_augment.distort", noted)
    TrivialAugment(seed=0)(np.zeros((14000, 2, 2, 3)), training=True)
    counts = np.bincount(seen["kind"].astype(int), minlength=14)
    assert len(counts) == 14
    assert np.abs(counts - 1000).max() < 150  # Five standard deviations.
    assert abs(seen["strength"].mean()) < 0.03
    assert (
        np.abs(np.quantile(seen["strength"], [0, 0.25, 0.75, 1]) - [-1, -0.5, 0.5, 1]).max() < 0.03
    )


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_pixels_stay_in_range_for_any_number_of_channels(channels):
    images = random_images(4, 56, 9, 7, channels)
    out = to_numpy(TrivialAugment(seed=0)(images, training=True))
    assert out.shape == images.shape
    assert out.min() >= 0
    assert out.max() <= 255.01
    np.testing.assert_array_equal(to_numpy(TrivialAugment()(images, training=False)), images)


def test_an_integer_dtype_rounds_the_pixels():
    images = random_images(10, 56, 9, 7, 3)
    expected, rounded = (
        TrivialAugment(seed=0, dtype=dtype)(images, training=True) for dtype in ("float32", "uint8")
    )
    assert keras.backend.standardize_dtype(rounded.dtype) == "uint8"
    assert np.abs(to_numpy(rounded) - to_numpy(expected)).max() < 0.501


@pytest.mark.parametrize("batched", [True, False])
def test_trivial_augment_works_in_a_pipeline_on_any_backend(batched):
    tf = pytest.importorskip("tensorflow")
    images = random_images(11, 30, 9, 7, 3)
    dataset = tf.data.Dataset.from_tensor_slices(images)
    dataset = dataset.batch(10) if batched else dataset
    layer = TrivialAugment(seed=0)
    dataset = dataset.map(lambda images: layer(images, training=True))
    found = np.stack([batch.numpy() for batch in dataset]).reshape(images.shape)
    assert found.dtype == "float32" and found.min() >= 0 and found.max() <= 255.01
    changed = np.abs(found - images).max(axis=(1, 2, 3)) > 2
    assert 15 < changed.sum() < 30


def test_images_of_unknown_size_are_refused():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_generator(
        lambda: iter(random_images(12, 1, 9, 7, 3)), output_signature=tf.TensorSpec((None, None, 3))
    )
    with pytest.raises(ValueError, match="known height.*Received: images.shape=.None, None, 3."):
        dataset.map(lambda image: TrivialAugment()(image, training=True))


# MixUp and CutMix


@pytest.mark.parametrize("batch_size", [6, 7])
def test_mixup_blends_each_image_with_its_partner(batch_size):
    images = random_images(5, batch_size, 8, 8, 3).astype("float32")
    layer = MixUpCutMix(mixup=1.0, cutmix=0.0, seed=1)
    mixed = to_numpy(layer(images, training=True))
    kept = float(to_numpy(layer.kept))
    assert 0 < kept < 1
    np.testing.assert_allclose(mixed, kept * images + (1 - kept) * images[::-1], atol=1e-3)


def test_cutmix_pastes_one_box_whose_area_is_the_fraction_not_kept():
    ours, theirs = np.zeros((3, 16, 24, 1)), np.ones((3, 16, 24, 1))
    layer = MixUpCutMix(mixup=0.0, cutmix=1.0, seed=2)
    areas = []
    for _ in range(100):
        mixed = to_numpy(layer(np.concatenate([ours, theirs]), training=True))[..., 0]
        box = mixed[0]
        np.testing.assert_array_equal(mixed[:3], [box] * 3)
        np.testing.assert_array_equal(mixed[3:], 1 - mixed[:3])
        rows, columns = box.max(axis=1), box.max(axis=0)
        np.testing.assert_array_equal(box, np.outer(rows, columns))  # A rectangle...
        for side in (rows, columns):
            assert np.abs(np.diff(side)).sum() <= 2  # ...without gaps.
        areas.append(box.mean())
        assert float(to_numpy(layer.kept)) == pytest.approx(1 - box.mean(), abs=1e-6)
    # Less than half of the image on average, because boxes may extend beyond it.
    assert 0.2 < np.mean(areas) < 0.45
    assert np.max(areas) > 0.7


def test_mixup_and_cutmix_are_applied_with_their_probabilities():
    images = np.concatenate([np.zeros((1, 16, 16, 1)), np.ones((1, 16, 16, 1))])
    layer, kinds = MixUpCutMix(mixup=0.3, cutmix=0.5, seed=3), []
    for _ in range(300):
        first = to_numpy(layer(images, training=True))[0]
        kinds.append("blended" if first.min() > 0 else "pasted" if first.any() else "left alone")
    fraction = {kind: kinds.count(kind) / 300 for kind in kinds}
    assert fraction["blended"] == pytest.approx(0.3, abs=0.11)
    # A few boxes are smaller than a pixel.
    assert fraction["pasted"] == pytest.approx(0.5, abs=0.11)
    np.testing.assert_array_equal(to_numpy(layer(images, training=False)), images)


@pytest.mark.parametrize("kind", [(1.0, 0.0), (0.0, 1.0)])
def test_mixed_integer_images_are_rounded(kind):
    images = random_images(13, 6, 8, 8, 3)
    expected, rounded = (
        MixUpCutMix(*kind, seed=1, dtype=dtype)(images, training=True)
        for dtype in ("float32", "uint8")
    )
    assert keras.backend.standardize_dtype(rounded.dtype) == "uint8"
    assert np.abs(to_numpy(rounded) - to_numpy(expected)).max() < 0.501


@pytest.mark.parametrize("kind", [(1.0, 0.0), (0.0, 1.0)])
@pytest.mark.parametrize("in_pipeline", [False, True])
def test_one_hot_labels_in_a_dictionary_are_mixed_like_their_images(kind, in_pipeline):
    labels = np.eye(6, dtype="int32")
    images = np.broadcast_to(255 * labels[:, None, None], (6, 16, 16, 6)).astype("uint8")
    data, layer = {"images": images, "labels": labels}, MixUpCutMix(*kind, seed=7)
    if in_pipeline:
        tf = pytest.importorskip("tensorflow")
        dataset = tf.data.Dataset.from_tensors(data).repeat(5)
        results = list(dataset.map(lambda data: layer(data, training=True)))
    else:
        results = [layer(data, training=True) for _ in range(5)]
    # With one channel per class, the mean of an image is its label.
    means = [np.asarray(result["images"]).mean(axis=(1, 2)) / 255 for result in results]
    found = np.stack([np.asarray(result["labels"]) for result in results])
    np.testing.assert_allclose(found, means, atol=1e-5)
    np.testing.assert_allclose(found.sum(axis=2), 1, atol=1e-6)
    assert len(np.unique(found.max(axis=(1, 2)))) > 2
    unchanged = layer(data)
    np.testing.assert_array_equal(np.asarray(unchanged["images"]), images)
    np.testing.assert_array_equal(np.asarray(unchanged["labels"]), labels)


@pytest.mark.parametrize(
    "shapes",
    [{"images": (4, 8, 8, 3)}, {"images": (4, 8, 8, 3), "labels": (4,)}, {"images": (8, 8, 3)}],
)
def test_dictionaries_without_batches_of_images_and_one_hot_labels_are_refused(shapes):
    for make in (np.zeros, keras.KerasTensor):
        with pytest.raises(ValueError, match="one-hot 'labels'.*Received: shapes="):
            MixUpCutMix()({name: make(shape) for name, shape in shapes.items()})
    with pytest.raises(ValueError, match="Expected a batch of images.*Received: images.shape="):
        MixUpCutMix()(np.zeros((8, 8, 3)))


@pytest.mark.skipif(
    keras.backend.backend() == "tensorflow", reason="There, a graph may also be a training step."
)
def test_a_pipeline_refuses_to_mix_images_without_labels():
    tf = pytest.importorskip("tensorflow")
    dataset = tf.data.Dataset.from_tensors(np.zeros((4, 8, 8, 3)))
    with pytest.raises(ValueError, match="inside `tf.data`.*Received"):
        dataset.map(lambda images: MixUpCutMix()(images, training=True))


@pytest.mark.parametrize("probabilities", [(0.6, 0.5), (-0.1, 0.5), (0.5, -0.1)])
def test_invalid_probabilities_are_refused(probabilities):
    with pytest.raises(ValueError, match="Received: (mixup|cutmix)="):
        MixUpCutMix(*probabilities)


def small_model(**settings):
    sizes = {"image_shape": (8, 8, 3), "num_classes": 4, "patch_size": 4, "embed_dim": 8}
    sizes |= {"mlp_dim": 8, "num_heads": 2, "depth": 2, "dropout": 0.0}
    return VisionTransformer(**{**sizes, **settings})


def test_the_training_loss_is_a_weighted_sum_over_both_labels():
    mix = MixUpCutMix(mixup=1.0, cutmix=0.0, seed=6)
    model = small_model(augmentation=[mix])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    images, labels = random_images(6, 8, 8, 8, 3), np.arange(8) % 3
    found = model.train_on_batch(images, labels)
    kept = float(to_numpy(mix.kept))
    mixed = kept * images + (1 - kept) * images[::-1]
    logits = to_numpy(model(mixed, training=False)).astype("float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    one_hot = np.eye(4)[labels]
    soft = kept * one_hot + (1 - kept) * one_hot[::-1]
    assert 0.01 < kept < 0.99
    assert found == pytest.approx(-(soft * log_probabilities).sum(axis=1).mean(), rel=1e-4)
    # Nothing is mixed in evaluation.
    logits = to_numpy(model(images, training=False)).astype("float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -(one_hot * log_probabilities).sum(axis=1).mean()
    assert model.test_on_batch(images, labels) == pytest.approx(expected, rel=1e-4)


def test_sample_weights_are_mixed_with_the_labels():
    """With weight on one image: its label counts by what was kept, its partner's by the rest."""
    mix = MixUpCutMix(mixup=1.0, cutmix=0.0, seed=5)
    model = small_model(augmentation=[mix])
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    images, labels = random_images(7, 4, 8, 8, 3), np.array([0, 1, 2, 3])
    weights = np.array([1.0, 0.0, 0.0, 0.0])
    found = model.train_on_batch(images, labels, sample_weight=weights)
    kept = float(to_numpy(mix.kept))
    logits = to_numpy(model(kept * images + (1 - kept) * images[::-1])).astype("float64")
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    expected = -(kept * log_probabilities[0, 0] + (1 - kept) * log_probabilities[3, 0]) / 4
    assert found == pytest.approx(expected, rel=1e-4)


def test_two_mixing_layers_are_refused():
    with pytest.raises(ValueError, match="at most one `MixUpCutMix`"):
        small_model(augmentation=[MixUpCutMix(), MixUpCutMix()])


# Label smoothing


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("shape", [(5,), (5, 1)])
def test_label_smoothing_agrees_with_the_formula(smoothing, shape):
    logits = np.random.default_rng(0).normal(size=(5, 4)).astype("float32")
    labels = np.array([0, 3, 1, 2, 2])
    target = (1 - smoothing) * np.eye(4)[labels] + smoothing / 4
    log_probabilities = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    found = LabelSmoothingCrossentropy(smoothing)(labels.reshape(shape), logits)
    expected = -(target * log_probabilities).sum(axis=1).mean()
    assert float(to_numpy(found)) == pytest.approx(expected, rel=1e-5)


def test_one_hot_labels_are_refused_naming_the_loss_for_them():
    message = "keras.losses.CategoricalCrossentropy.*label_smoothing=0.2.*Received: labels.shape="
    with pytest.raises(ValueError, match=message):
        LabelSmoothingCrossentropy(0.2)(np.eye(4), np.zeros((4, 4), "float32"))


@pytest.mark.parametrize("smoothing", [-0.1, 1.1])
def test_label_smoothing_out_of_range_is_refused(smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        LabelSmoothingCrossentropy(smoothing)


# Stochastic depth


def test_drop_path_rates_grow_with_depth():
    model = small_model(depth=4, stochastic_depth=0.4)
    rates = [model.get_layer(f"block_{block}_mlp_skip").rate for block in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    names = {layer.name for layer in small_model(depth=2).layers}
    assert "block_2_mlp_skip" not in names


def test_drop_path_zeroes_some_images_and_rescales_the_others():
    model = small_model(stochastic_depth=0.5)
    tokens = np.ones((4000, 3, 2), "float32")
    kept = to_numpy(model.get_layer("block_2_attention_skip")(tokens, training=True))
    assert set(np.unique(kept)) == {0.0, 2.0}
    assert np.all(kept == kept[:, :1, :1])
    assert kept.mean() == pytest.approx(1, abs=0.1)


# All layers in one model


@pytest.mark.slow
def test_a_model_with_all_layers_trains_and_can_be_saved_and_loaded(tmp_path):
    model = small_model(augmentation=[TrivialAugment(seed=1), MixUpCutMix()], stochastic_depth=0.2)
    images, labels = random_images(8, 40, 8, 8, 3), np.arange(40) % 4
    model.adapt(images)
    model.compile("adamw", LabelSmoothingCrossentropy(), metrics=["accuracy"])
    model.fit(images, labels, batch_size=16, epochs=2, verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(
        loaded.predict(images, verbose=0), model.predict(images, verbose=0)
    )
    assert json.dumps(loaded.get_config()) == json.dumps(model.get_config())
    assert loaded.loss.label_smoothing == 0.1


@pytest.mark.slow
@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="`fit` compiles on JAX")
def test_xla_compiles_all_layers():
    model = small_model(augmentation=[TrivialAugment(), MixUpCutMix()], stochastic_depth=0.2)
    model.compile("adamw", LabelSmoothingCrossentropy(), jit_compile=True)
    images, labels = random_images(9, 8, 8, 8, 3), np.arange(8) % 4
    assert np.isfinite(model.train_on_batch(images, labels))
