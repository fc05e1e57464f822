"""The model against an independent PyTorch model, its parameter counts, and saved files."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings

import keras
import numpy as np
import pytest
from keras import ops

import keras_vit
from keras_vit.layers import Normalization

SIZES = {
    "image_shape": (8, 8, 3),
    "num_classes": 5,
    "patch_size": 4,
    "embed_dim": 16,
    "mlp_dim": 24,
    "num_heads": 2,
    "depth": 2,
}


def random_images(seed, *shape):
    """uint8 images whose channels differ in mean and contrast."""
    rng = np.random.default_rng(seed)
    contrast = np.linspace(0.3, 1.0, shape[-1])
    return (rng.integers(0, 256, shape) * contrast).astype("uint8")


def randomize(model, seed=0):
    """Gives all weights random values; zero biases would hide mistakes."""
    rng = np.random.default_rng(seed)
    for weight in model.trainable_weights:
        if weight.path.endswith(("kernel", "token", "position")):
            deviation = 0.5 if weight.shape[0] < 100 else 0.1
            value = rng.normal(0, deviation, weight.shape)
        elif weight.path.endswith("gamma"):
            value = rng.normal(1, 0.3, weight.shape)
        else:
            value = rng.normal(0, 0.3, weight.shape)
        weight.assign(value.astype("float32"))


def make_model(seed=0, **changes):
    sizes = {**SIZES, **changes}
    model = keras_vit.VisionTransformer(**sizes)
    model.adapt(random_images(100, 32, *sizes["image_shape"]))
    randomize(model, seed)
    return model


def predict(model, images):
    return ops.convert_to_numpy(model(images, training=False))


def by_predict(model, images):
    return np.asarray(model.predict(images, verbose=0))


@pytest.fixture(scope="module")
def model():
    """A small model with random weights; tests must not modify it."""
    return make_model()


@pytest.fixture(scope="module")
def default_model():
    return keras_vit.VisionTransformer()


@pytest.fixture
def saved(model, tmp_path):
    model.save(tmp_path / "model.keras")
    return tmp_path / "model.keras"


class Blackout(keras.layers.Layer):
    """Black images in training, which is the default as in Keras's own random layers."""

    def call(self, images, training=True):
        return 0 * images if training else images


class Invert(keras.layers.Layer):
    """A layer that calls another one, and takes no `training` itself."""

    def __init__(self, inner, **kwargs):
        super().__init__(**kwargs)
        self.inner = inner

    def call(self, images):
        return 255 - self.inner(images)


def inferred(model, images):
    return ops.convert_to_numpy(model(images))


def in_training(model, images):
    return ops.convert_to_numpy(model(images, training=True))


def layers_of(model, kind):
    return [layer for layer in model.layers if isinstance(layer, kind)]


# Architecture


def test_the_default_model_has_exactly_3195146_trainable_parameters(default_model):
    count = sum(math.prod(weight.shape) for weight in default_model.trainable_weights)
    assert count == 3_195_146


def test_the_default_model_maps_32x32_rgb_images_to_ten_logits(default_model):
    assert default_model.input_shape == (None, 32, 32, 3)
    assert default_model.output_shape == (None, 10)
    (output,) = {layer.activation for layer in default_model.layers if layer.name == "head"}
    assert output is keras.activations.linear


def test_every_layer_normalization_of_the_default_model_has_epsilon_1e_6(default_model):
    norms = layers_of(default_model, keras.layers.LayerNormalization)
    assert [norm.epsilon for norm in norms] == [1e-6] * 13


def test_every_dropout_of_the_default_model_is_20_percent_attention_included(default_model):
    dropouts = layers_of(default_model, keras.layers.Dropout)
    assert [layer.rate for layer in dropouts] == [0.2] * 13
    attentions = layers_of(default_model, keras.layers.MultiHeadAttention)
    assert [layer.get_config()["dropout"] for layer in attentions] == [0.2] * 6


def test_attention_has_8_heads_of_32_in_each_of_6_blocks(default_model):
    attentions = layers_of(default_model, keras.layers.MultiHeadAttention)
    heads = [(x.get_config()["num_heads"], x.get_config()["key_dim"]) for x in attentions]
    assert heads == [(8, 32)] * 6


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"image_shape": (8, 12, 1), "patch_size": 2, "num_heads": 4, "depth": 1},
        {"image_shape": (6, 6, 4), "patch_size": 3, "num_heads": 1, "depth": 3},
        {"image_shape": (8, 12, 3), "pooling": "mean"},
    ],
)
def test_logits_agree_with_an_independent_pytorch_model(changes):
    pytest.importorskip("torch")
    assert_agrees_with_pytorch(make_model(**changes), {**SIZES, **changes})


def test_logits_of_the_default_sizes_agree_with_an_independent_pytorch_model(default_model):
    pytest.importorskip("torch")
    model = keras_vit.VisionTransformer.from_config(default_model.get_config())
    model.adapt(random_images(100, 32, 32, 32, 3))
    randomize(model)
    sizes = {"image_shape": (32, 32, 3), "num_classes": 10, "patch_size": 4}
    sizes |= {"embed_dim": 256, "mlp_dim": 512, "num_heads": 8, "depth": 6}
    assert_agrees_with_pytorch(model, sizes)


def assert_agrees_with_pytorch(model, sizes):
    import torch
    from torch_reference import reference_of

    reference = reference_of(model, random_images(100, 32, *sizes["image_shape"]), **sizes)
    images = random_images(1, 6, *sizes["image_shape"])
    with torch.no_grad():
        theirs = reference(torch.tensor(images))[0].numpy()
    assert theirs.std(axis=0).min() > 0.05
    np.testing.assert_allclose(predict(model, images), theirs, atol=1e-4)


def test_the_first_step_updates_every_trainable_weight():
    model = keras_vit.VisionTransformer(**SIZES)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(1.0), loss)
    before = model.get_weights()
    model.train_on_batch(random_images(2, 10, 8, 8, 3), np.arange(10) % 5)
    same = [np.array_equal(old, new) for old, new in zip(before, model.get_weights())]
    unchanged = [weight.path for weight, is_same in zip(model.weights, same) if is_same]
    trainable = {weight.path for weight in model.trainable_weights}
    # Softmax is invariant to a constant added to all scores: key biases get no gradient.
    assert not [x for x in unchanged if x in trainable and not x.endswith("key/bias")]


# Pixels: augmentation and normalization


def test_flip_crop_and_normalization_are_the_first_layers_in_this_order(default_model):
    def before(layer):
        return layer.input._keras_history.operation

    (norm,) = layers_of(default_model, Normalization)
    chain = [norm, before(norm), before(before(norm)), before(before(before(norm)))]
    kinds = [Normalization, keras_vit.RandomResizedCrop]
    kinds += [keras.layers.RandomFlip, keras.layers.InputLayer]
    assert [type(layer) for layer in chain] == kinds
    crop, flip = chain[1], chain[2]
    assert (crop.height, crop.width) == (32, 32)
    assert (crop.scale, crop.ratio) == ((0.8, 1.0), (0.9, 1.1))
    assert flip.mode == "horizontal"


def normalized(model, images):
    """The normalized pixels `(B, H, W, C)` in float64."""
    (norm,) = layers_of(model, Normalization)
    pixels = keras.Model(model.input, norm.output)(images)
    return ops.convert_to_numpy(pixels).astype("float64")


@pytest.mark.parametrize(
    "make",
    [
        lambda: [keras.layers.RandomFlip("horizontal")],
        lambda: [keras.layers.Rescaling(1 / 255), keras.layers.RandomBrightness(0.1)],
        lambda: [keras.layers.Resizing(12, 16)],
        lambda: [keras.layers.CenterCrop(4, 4)],
        lambda: [keras_vit.RandomResizedCrop(4, 8)],
        lambda: [keras.layers.Normalization(mean=9.0, variance=4.0, name="mine")],
        lambda: [keras.layers.Lambda(lambda x: x * x)],
    ],
    ids=["flip", "rescaling", "resizing", "center_crop", "crop", "normalization", "lambda"],
)
def test_adapt_normalizes_the_output_of_the_augmentation(make):
    images = random_images(3, 50, 8, 8, 3)
    model = make_model(augmentation=make(), depth=1)
    model.adapt(images)
    found = normalized(model, images)
    np.testing.assert_allclose(found.mean(axis=(0, 1, 2)), 0, atol=1e-5)
    np.testing.assert_allclose(found.var(axis=(0, 1, 2)), 1, atol=1e-5)


@pytest.mark.parametrize("value", [0, 77, 255, 0.1])
def test_a_constant_channel_is_centered_but_not_scaled(value):
    images = random_images(3, 3000, 8, 8, 3).astype("float32")
    images[..., 1] = value
    model = make_model(augmentation=[keras_vit.TrivialAugment()], depth=1)
    with pytest.warns(
        UserWarning, match=r"Channels \[1\] of 3 \(counted from 0\) are constant"
    ) as warned:
        model.adapt(images)
    assert [x.category for x in warned].count(UserWarning) == 1
    norm = model.get_layer("normalization")
    mean, variance = (ops.convert_to_numpy(x) for x in (norm.mean, norm.variance))
    assert (mean[1], variance[1]) == (np.float32(value), 0)
    one_more = images[:2] + np.float32([0, 1, 0])
    np.testing.assert_allclose(normalized(model, one_more)[..., 1], 1, atol=1e-6)
    assert np.abs(in_training(keras.Model(model.input, norm.output), images[:64])).max() < 256


def test_mean_and_variance_agree_with_numpy_in_float64():
    offset = np.float32([0, 1000, -5])
    images = random_images(3, 7000, 8, 8, 3) * np.float32([1, 0.01, 1e-3]) + offset
    norm = Normalization(dtype="float32")
    norm.adapt(images[start : start + 999] for start in range(0, 7000, 999))
    pixels = images.astype("float64")
    for found, expected in (
        (norm.mean, pixels.mean((0, 1, 2))),
        (norm.variance, pixels.var((0, 1, 2))),
    ):
        np.testing.assert_allclose(ops.convert_to_numpy(found), expected, rtol=1e-6)
    with pytest.raises(ValueError, match="at least one batch"):
        norm.adapt([])


@pytest.mark.parametrize("floatx", ["float16", "float64"])
def test_a_model_can_be_adapted_with_any_default_float_type(floatx):
    images = random_images(3, 50, 8, 8, 3)
    before = keras.config.dtype_policy()
    try:
        keras.config.set_floatx(floatx)
        keras.config.set_dtype_policy(floatx)
        model = keras_vit.VisionTransformer(**SIZES)
        model.adapt(images)
        assert model.get_layer("block_1_attention").compute_dtype == floatx
        found = normalized(model, images), inferred(model, images)
    finally:
        keras.config.set_floatx("float32")
        keras.config.set_dtype_policy(before)
    np.testing.assert_allclose(found[0].var(axis=(0, 1, 2)), 1, atol=1e-5)
    assert found[1].dtype == np.float32 and np.isfinite(found[1]).all()


def test_adapt_and_set_weights_take_effect_after_predict_evaluate_and_fit():
    images, labels = random_images(4, 6, 8, 8, 3), np.arange(6) % 5
    model, other = make_model(dropout=0.0), make_model(seed=1)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.SGD(0.0), loss)
    model.fit(images, labels, verbose=0)
    first, first_loss = by_predict(model, images), model.evaluate(images, labels, verbose=0)
    model.adapt(images // 2)
    second, second_loss = by_predict(model, images), model.evaluate(images, labels, verbose=0)
    assert np.abs(second - first).max() > 0.1 and abs(second_loss - first_loss) > 0.01
    np.testing.assert_allclose(second, inferred(model, images), atol=1e-5)
    other.adapt(images // 3)
    model.set_weights(other.get_weights())
    np.testing.assert_allclose(by_predict(model, images), by_predict(other, images), atol=1e-5)


def test_uint8_and_float_images_give_equal_logits(model):
    images = random_images(4, 6, 8, 8, 3)
    expected = by_predict(model, images)
    assert np.abs(expected).max() > 0.1
    for dtype in ("float32", "float64", "int32"):
        np.testing.assert_allclose(by_predict(model, images.astype(dtype)), expected, atol=1e-6)


def nested(model):
    """The model, and typical models that contain it or a part of it."""
    images = keras.Input((8, 8, 3))
    cut = keras.Model(model.input, model.layers[-2].output)
    return {
        "itself": model,
        "Sequential": keras.Sequential([images, keras.layers.Rescaling(1.0), model]),
        "functional": keras.Model(images, keras.layers.Softmax()(model(images))),
        "cut": cut,
        "cut within": keras.Model(images, cut(images)),
    }


@pytest.mark.parametrize("kind", ["itself", "Sequential", "functional", "cut", "cut within"])
def test_inference_is_the_default_when_training_is_not_passed(model, kind):
    images, whole = random_images(5, 6, 8, 8, 3), nested(model)[kind]
    expected = by_predict(whole, images)
    for _ in range(2):
        np.testing.assert_allclose(inferred(whole, images), expected, atol=1e-5)
    again = keras.models.clone_model(whole)
    np.testing.assert_array_equal(inferred(again, images), inferred(again, images))
    one, other = (in_training(whole, images) for _ in range(2))
    assert np.abs(one - expected).max() > 1e-2
    assert np.abs(one - other).max() > 1e-2


@pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="formats of TensorFlow")
@pytest.mark.parametrize("kind", ["itself", "cut within"])
def test_compiled_and_exported_functions_run_in_inference_mode(model, kind, tmp_path):
    import tensorflow as tf

    images, whole = random_images(5, 6, 8, 8, 3).astype("float32"), nested(model)[kind]
    expected = by_predict(whole, images)
    whole.export(tmp_path / "model", verbose=False)
    loaded = tf.saved_model.load(tmp_path / "model")
    compiled = [tf.function(whole), tf.function(whole, jit_compile=True), loaded.serve]
    for function in compiled:
        np.testing.assert_allclose(function(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "layer"),
    [
        ("itself", Blackout()),
        ("Sequential", Invert(Blackout())),
        ("functional", keras.Sequential([Blackout()])),
    ],
)
def test_random_layers_act_only_in_fit(kind, layer):
    """In training all images are black: `fit` has the loss of `evaluate` on black images."""
    model = make_model(dropout=0.0, augmentation=[layer])
    whole = nested(model)[kind]
    images, labels = random_images(5, 6, 8, 8, 3), np.arange(6) % 5
    expected = by_predict(whole, images)
    np.testing.assert_allclose(inferred(whole, images), expected, atol=1e-5)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=kind != "functional")
    whole.compile(keras.optimizers.SGD(0.0), loss)
    in_fit = whole.fit(images, labels, verbose=0).history["loss"][0]
    assert in_fit == pytest.approx(whole.evaluate(0 * images, labels, verbose=0), rel=1e-4)
    assert in_fit != pytest.approx(whole.evaluate(images, labels, verbose=0), rel=1e-2)


def test_augmentation_acts_in_training_even_without_dropout():
    model = make_model(dropout=0.0)
    images = random_images(6, 6, 8, 8, 3)
    trained = ops.convert_to_numpy(model(images, training=True))
    assert np.abs(trained - predict(model, images)).max() > 1e-2


def test_an_empty_augmentation_leaves_training_images_unchanged():
    model = make_model(dropout=0.0, augmentation=[])
    assert not layers_of(model, (keras.layers.RandomFlip, keras_vit.RandomResizedCrop))
    images = random_images(7, 6, 8, 8, 3)
    trained = ops.convert_to_numpy(model(images, training=True))
    np.testing.assert_allclose(trained, predict(model, images), atol=1e-5)


def test_a_custom_augmentation_replaces_the_default():
    invert = keras.layers.Rescaling(-1.0, offset=255.0)
    inverting, plain = make_model(augmentation=[invert]), make_model(augmentation=[])
    plain.adapt(255 - random_images(100, 32, 8, 8, 3))
    images = random_images(8, 6, 8, 8, 3)
    logits = predict(inverting, images)
    np.testing.assert_allclose(logits, predict(plain, 255 - images), atol=1e-5)
    assert np.abs(logits - predict(plain, images)).max() > 1e-2


# Training and precision


def test_a_few_steps_of_fit_learn_to_classify_dark_and_bright_images():
    keras.utils.set_random_seed(9)
    model = keras_vit.VisionTransformer(**SIZES)
    images, labels = random_images(9, 16, 8, 8, 3), np.arange(16) % 2
    images[labels == 0] //= 4
    model.adapt(images)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(1e-2), loss, metrics=["accuracy"])
    model.fit(images, labels, batch_size=16, epochs=8, verbose=0)
    loss, accuracy = model.evaluate(images, labels, verbose=0)
    assert loss < 0.5 * math.log(5)
    assert accuracy == 1


def test_logits_are_float32_under_mixed_precision_and_close_to_full_precision(model, tmp_path):
    mixed = make_model(dtype="mixed_bfloat16")
    assert keras.config.dtype_policy().name == "float32"
    assert mixed.get_layer("block_1_mlp_hidden").compute_dtype == "bfloat16"
    images = random_images(10, 6, 8, 8, 3)
    logits, expected = predict(mixed, images), predict(model, images)
    assert logits.dtype == np.float32
    assert 0 < np.abs(logits - expected).max() < 0.1 * np.abs(expected).max()
    mixed.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.get_layer("block_1_attention").compute_dtype == "bfloat16"
    np.testing.assert_allclose(predict(again, images), logits, atol=1e-6)


def test_the_global_policy_is_the_default():
    before = keras.config.dtype_policy()
    try:
        keras.config.set_dtype_policy("mixed_bfloat16")
        assert make_model().get_layer("block_1_attention").compute_dtype == "bfloat16"
    finally:
        keras.config.set_dtype_policy(before)


def test_no_layer_disables_xla(default_model):
    assert all(layer.supports_jit for layer in default_model.layers)


# Files


def test_a_loaded_model_makes_the_predictions_of_the_saved_one(model, saved):
    again = keras.saving.load_model(saved)
    images = random_images(11, 6, 8, 8, 3)
    assert type(again) is keras_vit.VisionTransformer
    np.testing.assert_allclose(predict(again, images), predict(model, images), atol=1e-6)


def test_a_loaded_model_keeps_its_normalization_and_augmentation(tmp_path):
    crop = keras_vit.RandomResizedCrop(8, 8, scale=(0.1, 0.4), ratio=(0.5, 2.0), name="crop")
    model = make_model(dropout=0.0, augmentation=[crop])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    (loaded,) = layers_of(again, keras_vit.RandomResizedCrop)
    assert (loaded.scale, loaded.ratio) == ((0.1, 0.4), (0.5, 2.0))
    images = random_images(12, 6, 8, 8, 3)
    trained = ops.convert_to_numpy(again(images, training=True))
    assert np.abs(trained - predict(again, images)).max() > 1e-2

    pixels = random_images(100, 32, 8, 8, 3).astype("float64")
    normalization = again.get_layer("normalization")
    mean, variance = (
        ops.convert_to_numpy(x).ravel() for x in (normalization.mean, normalization.variance)
    )
    np.testing.assert_allclose(mean, pixels.mean(axis=(0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(variance, pixels.var(axis=(0, 1, 2)), rtol=1e-4)


def test_frozen_layers_stay_frozen_in_a_file_including_nested_ones(tmp_path):
    model = make_model()
    model.get_layer("block_1_attention").query_dense.trainable = False
    model.get_layer("block_2_attention").trainable = False
    model.get_layer("block_2_attention").value_dense.trainable = True
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    frozen = [layer.name for layer in again.layers if not layer.trainable]
    assert frozen == ["block_2_attention"]
    trainable = [weight.path for weight in model.trainable_weights]
    assert [weight.path for weight in again.trainable_weights] == trainable
    model.trainable = False
    whole = keras_vit.VisionTransformer.from_config(model.get_config())
    assert not whole.trainable and not whole.trainable_weights
    # The format of earlier versions.
    model.trainable = True
    config = {**model.get_config(), "frozen": ["head"]}
    del config["trainable_layers"], config["quantized_layers"]
    assert not keras_vit.VisionTransformer.from_config(config).get_layer("head").trainable


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["int8", "int4"])
def test_a_quantized_model_is_loaded_as_it_was_saved(mode, tmp_path):
    model = make_model(depth=1)
    images = random_images(11, 6, 8, 8, 3)
    whole = inferred(model, images)
    model.quantize(mode)
    expected = inferred(model, images)
    assert 0 < np.abs(expected - whole).max() < np.abs(whole).max()
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert json.dumps(again.get_config()) == json.dumps(model.get_config())
    np.testing.assert_allclose(inferred(again, images), expected, atol=1e-6)


def test_a_loaded_model_can_be_adapted_and_saved_again(saved, tmp_path):
    once = keras.saving.load_model(saved)
    images = random_images(13, 6, 8, 8, 3)
    once.adapt(images // 2)
    once.save(tmp_path / "twice.keras")
    twice = keras.saving.load_model(tmp_path / "twice.keras")
    np.testing.assert_allclose(predict(twice, images), predict(once, images), atol=1e-6)


def test_a_model_from_its_config_has_the_same_graph(model):
    config = model.get_config()
    again = keras_vit.VisionTransformer.from_config(config)
    assert again.get_config() == config
    assert [x.name for x in again.layers] == [x.name for x in model.layers]
    assert [x.shape for x in again.weights] == [x.shape for x in model.weights]


@pytest.mark.parametrize(
    "imports",
    [
        "import keras_vit, keras",
        pytest.param("import keras, keras_vit", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "backend", ["tensorflow", *(pytest.param(x, marks=pytest.mark.slow) for x in ("jax", "torch"))]
)
def test_another_process_can_load_the_file_on_any_backend(backend, imports, model, saved, tmp_path):
    if importlib.util.find_spec(backend) is None:
        pytest.skip(f"{backend} is not installed")
    images = random_images(14, 3, 8, 8, 3)
    np.save(tmp_path / "images.npy", images)
    script = f"""
{imports}
import numpy as np
model = keras.saving.load_model({str(saved)!r})
logits = model.predict(np.load({str(tmp_path / "images.npy")!r}), verbose=0)
np.save({str(tmp_path / "logits.npy")!r}, logits)
"""
    environment = {**os.environ, "KERAS_BACKEND": backend}
    run = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), predict(model, images), atol=1e-4)


def test_images_of_another_shape_are_refused(model):
    with pytest.raises(ValueError):
        model(np.zeros((2, 12, 8, 3), "float32"))


def test_training_on_raw_pixels_without_adapt_warns_once():
    sizes = {"embed_dim": 8, "mlp_dim": 8, "num_heads": 2, "depth": 1}

    def warned(model):
        model.compile("sgd", "mse")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            model.make_train_function()
            model.make_train_function()
        return [str(x.message) for x in caught if "adapted" in str(x.message)]

    assert len(warned(keras_vit.VisionTransformer((8, 8, 3), **sizes))) == 1
    adapted = keras_vit.VisionTransformer((8, 8, 3), **sizes)
    adapted.adapt(np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3)))
    rescaled = [keras.layers.Rescaling(1 / 255)]
    assert not warned(adapted)
    assert not warned(keras_vit.VisionTransformer((8, 8, 3), augmentation=rescaled, **sizes))
