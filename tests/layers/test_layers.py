"""Keras's standard layer tests; patches against slices, tokens against their weights."""

import json

import keras
import numpy as np
import pytest
from keras import ops

from keras_vit.layers import (
    ClassToken,
    Dropout,
    FirstToken,
    LayerNormalization,
    MixUpCutMix,
    Patches,
    PositionEmbedding,
    RandomResizedCrop,
    TrivialAugment,
)


def to_numpy(tensor):
    return ops.convert_to_numpy(ops.cast(tensor, "float32"))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def sliced(image, side):
    """Patches `(N, P * P * C)` of one image, sliced one by one."""
    height, width, _ = image.shape
    return np.stack(
        [
            image[top : top + side, left : left + side].ravel()
            for top in range(0, height, side)
            for left in range(0, width, side)
        ]
    )


# Keras's standard layer tests

IMAGES, TOKENS = (2, 8, 12, 3), (2, 5, 8)
# Class, arguments, shapes of input and output, weights and seed generators.
LAYERS = [
    (ClassToken, {}, TOKENS, (2, 6, 8), 1, 0),
    (FirstToken, {}, TOKENS, (2, 8), 0, 0),
    (Dropout, {"rate": 0.2}, TOKENS, TOKENS, 0, 1),
    (LayerNormalization, {}, TOKENS, TOKENS, 2, 0),
    (MixUpCutMix, {"seed": 1}, IMAGES, IMAGES, 1, 1),
    (Patches, {"patch_size": 4}, IMAGES, (2, 6, 48), 0, 0),
    (PositionEmbedding, {}, TOKENS, TOKENS, 1, 0),
    (RandomResizedCrop, {"height": 4, "width": 6}, IMAGES, (2, 4, 6, 3), 0, 1),
    (RandomResizedCrop, {"height": 8, "width": 12}, IMAGES, IMAGES, 0, 1),
    (TrivialAugment, {"seed": 1}, IMAGES, IMAGES, 0, 1),
]


@pytest.mark.parametrize(("kind", "arguments", "shape", "expected", "weights", "seeds"), LAYERS)
def test_a_layer_can_be_built_and_restored_from_its_config(
    kind, arguments, shape, expected, weights, seeds
):
    layer = kind(**arguments)
    assert layer.compute_output_shape(shape) == expected
    layer.build(shape)
    assert len(layer.weights) == weights
    assert len(layer.variables) == weights + seeds
    again = kind.from_config(json.loads(json.dumps(layer.get_config())))
    assert again.get_config() == layer.get_config()


DTYPES = [("float32", "float32"), ("mixed_bfloat16", "float32")]
INTEGER_DTYPES = [("float32", "uint8"), ("uint8", "float32"), ("uint8", "uint8")]


@pytest.mark.parametrize(
    ("kind", "arguments", "shape", "expected", "policy", "dtype"),
    [
        (*row[:4], *dtypes)
        for row in LAYERS
        for dtypes in DTYPES + (INTEGER_DTYPES if row[2] is IMAGES else [])
    ],
)
@pytest.mark.parametrize("training", [True, False])
def test_symbolic_eager_and_graph_results_agree(
    kind, arguments, shape, expected, policy, dtype, training
):
    layer = kind(**arguments, dtype=policy)
    images = (100 * np.abs(normal(12, *shape))).astype(dtype)
    keywords = (
        {}
        if kind in (Patches, ClassToken, FirstToken, PositionEmbedding)
        else {"training": training}
    )
    symbolic = layer(keras.Input(batch_shape=shape, dtype=dtype), **keywords)
    assert symbolic.shape == expected
    results = [layer(images, **keywords)]
    if keras.backend.backend() == "tensorflow":
        import tensorflow as tf

        results.append(tf.function(lambda x: layer(x, **keywords))(tf.constant(images)))
    for result in results:
        assert tuple(result.shape) == expected
        assert keras.backend.standardize_dtype(result.dtype) == symbolic.dtype
    if not training:
        first, last = to_numpy(results[0]), to_numpy(results[-1])
        np.testing.assert_allclose(first, last, rtol=1e-4, atol=1e-4)


def test_a_stateless_layer_is_built_on_creation():
    assert Patches(4).built


# Patches


@pytest.mark.parametrize(
    ("height", "width", "channels", "patch_size"),
    [(8, 8, 3, 4), (8, 12, 3, 4), (12, 8, 1, 2), (6, 6, 2, 6), (3, 5, 4, 1), (32, 32, 3, 4)],
)
def test_patches_are_slices_of_the_image_row_by_row(height, width, channels, patch_size):
    images = normal(0, 3, height, width, channels)
    patches = to_numpy(Patches(patch_size)(images))
    np.testing.assert_array_equal(patches, [sliced(image, patch_size) for image in images])


def test_a_patch_can_be_reshaped_to_a_small_image():
    images = normal(1, 1, 8, 12, 3)
    second_of_second_row = to_numpy(Patches(4)(images))[0, 4].reshape(4, 4, 3)
    np.testing.assert_array_equal(second_of_second_row, images[0, 4:8, 4:8])


def test_patches_of_an_unknown_batch_size_have_a_static_shape():
    inputs = keras.Input((8, 12, 3))
    outputs = Patches(4)(inputs)
    assert outputs.shape == (None, 6, 48)
    assert Patches(4).compute_output_shape((None, 8, 12, 3)) == (None, 6, 48)
    model = keras.Model(inputs, outputs)
    for batch_size in (1, 5):
        images = normal(2, batch_size, 8, 12, 3)
        np.testing.assert_array_equal(
            model.predict(images, verbose=0), [sliced(image, 4) for image in images]
        )


@pytest.mark.parametrize(
    ("height", "width", "patch_size"), [(8, 8, 3), (8, 10, 4), (10, 8, 4), (4, 4, 8)]
)
def test_a_patch_size_that_does_not_divide_the_image_is_refused_naming_both(
    height, width, patch_size
):
    with pytest.raises(ValueError) as error:
        Patches(patch_size)(np.zeros((2, height, width, 3), "float32"))
    assert f"patch_size={patch_size}, height={height}, width={width}" in str(error.value)
    with pytest.raises(ValueError, match=f"patch_size={patch_size}, height={height}"):
        Patches(patch_size)(keras.Input((height, width, 3)))


@pytest.mark.parametrize("patch_size", [0, -4, 4.0, "4", None, True, (4, 4)])
def test_a_patch_size_that_is_not_a_positive_integer_is_refused(patch_size):
    with pytest.raises(ValueError) as error:
        Patches(patch_size)
    assert "Expected `patch_size` to be an integer of at least 1" in str(error.value)
    assert f"Received: patch_size={patch_size!r}" in str(error.value)


@pytest.mark.parametrize("shape", [(None, None, 8, 3), (None, 8, 8, None), (8, 8, 3), (8, 8)])
def test_patches_of_images_without_a_known_shape_are_refused(shape):
    with pytest.raises(ValueError, match="Expected images of shape .* Received: shape="):
        Patches(4)(keras.KerasTensor(shape))


def test_patches_can_be_serialized_without_custom_objects():
    layer = Patches(2, name="pieces", dtype="float16")
    text = json.dumps(keras.saving.serialize_keras_object(layer))
    assert json.loads(text)["registered_name"] == "keras_vit>Patches"
    again = keras.saving.deserialize_keras_object(json.loads(text))
    assert (again.patch_size, again.name, again.compute_dtype) == (2, "pieces", "float16")
    images = normal(3, 2, 4, 6, 3)
    np.testing.assert_array_equal(to_numpy(layer(images)), to_numpy(again(images)))


# Class token


def test_the_class_token_is_prepended_to_every_sequence():
    layer = ClassToken()
    tokens = normal(4, 3, 5, 7)
    layer.build(tokens.shape)
    token = normal(5, 1, 1, 7)
    layer.set_weights([token])
    expected = np.concatenate([np.repeat(token, 3, axis=0), tokens], axis=1)
    np.testing.assert_array_equal(to_numpy(layer(tokens)), expected)


def test_the_class_token_is_the_only_weight_and_trainable():
    layer = ClassToken()
    layer.build((None, 5, 7))
    assert [tuple(weight.shape) for weight in layer.trainable_weights] == [(1, 1, 7)]
    assert layer.non_trainable_weights == []


@pytest.mark.parametrize("layer", [ClassToken, PositionEmbedding])
def test_tokens_are_initialized_as_normal_noise(layer):
    layer = layer()
    layer.build((None, 1, 5000))
    values = to_numpy(layer.weights[0])
    assert values.mean() == pytest.approx(0, abs=0.02)
    assert values.std() == pytest.approx(0.2, rel=0.1)


def test_two_layers_of_a_model_are_initialized_differently():
    one, two = ClassToken(), ClassToken()
    one.build((None, 5, 7))
    two.build((None, 5, 7))
    assert np.abs(one.get_weights()[0] - two.get_weights()[0]).max() > 1e-4


# Positions


def test_a_position_embedding_adds_one_vector_per_position_to_every_sequence():
    layer = PositionEmbedding()
    tokens = normal(6, 3, 5, 7)
    layer.build(tokens.shape)
    position = normal(7, 1, 5, 7)
    layer.set_weights([position])
    expected = np.stack([sequence + position[0] for sequence in tokens])
    np.testing.assert_allclose(to_numpy(layer(tokens)), expected, atol=1e-6)


def test_a_position_embedding_has_one_trainable_vector_per_position():
    layer = PositionEmbedding()
    layer.build((None, 5, 7))
    assert [tuple(weight.shape) for weight in layer.trainable_weights] == [(1, 5, 7)]


# Both


@pytest.mark.parametrize(("layer", "length"), [(ClassToken, 6), (PositionEmbedding, 5)])
def test_an_unknown_batch_size_is_kept(layer, length):
    inputs = keras.Input((5, 7))
    outputs = layer()(inputs)
    assert outputs.shape == (None, length, 7)
    model = keras.Model(inputs, outputs)
    assert model.predict(normal(8, 4, 5, 7), verbose=0).shape == (4, length, 7)


@pytest.mark.parametrize("layer", [ClassToken, PositionEmbedding])
def test_half_precision_tokens_stay_in_half_precision(layer):
    tokens = ops.cast(normal(9, 2, 5, 7), "bfloat16")
    layer = layer(dtype="mixed_bfloat16")
    assert keras.backend.standardize_dtype(layer(tokens).dtype) == "bfloat16"
    assert keras.backend.standardize_dtype(layer.weights[0].dtype) == "float32"


@pytest.mark.parametrize("layer", [ClassToken, PositionEmbedding])
def test_trained_tokens_are_restored_from_a_saved_model(layer, tmp_path):
    model = keras.Sequential([keras.Input((5, 7)), layer(name="learned")])
    model.set_weights([normal(10, *weight.shape) for weight in model.weights])
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    tokens = normal(11, 2, 5, 7)
    np.testing.assert_array_equal(
        again.predict(tokens, verbose=0), model.predict(tokens, verbose=0)
    )
    assert isinstance(again.get_layer("learned"), layer)


@pytest.mark.parametrize("layer", [ClassToken, PositionEmbedding])
def test_a_custom_initializer_is_serialized(layer):
    config = keras.saving.serialize_keras_object(layer(initializer=keras.initializers.Constant(3)))
    again = keras.saving.deserialize_keras_object(json.loads(json.dumps(config)))
    again.build((None, 5, 7))
    np.testing.assert_array_equal(to_numpy(again.weights[0]), np.full(again.weights[0].shape, 3.0))
