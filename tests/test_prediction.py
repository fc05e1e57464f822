"""Class probabilities of arrays and of files."""

import keras
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

import keras_vit
from keras_vit import VisionTransformer, prediction

SIZES = {"embed_dim": 16, "mlp_dim": 16, "num_heads": 2, "depth": 1}


def tiny(*arguments, **settings):
    model = VisionTransformer(*arguments, **SIZES, **settings)
    kernel = model.get_layer("head").kernel
    kernel.assign(np.random.default_rng(0).normal(size=kernel.shape))
    return model


@pytest.fixture(scope="module")
def padding():
    """A model of images with an alpha channel, which are padded."""
    return tiny((8, 12, 4), 3, resize="pad")


def test_probabilities_are_the_softmax_of_the_logits(padding, monkeypatch):
    monkeypatch.setattr(prediction, "BATCH_SIZE", 2)
    images = np.random.default_rng(1).integers(0, 256, (5, 8, 12, 4), dtype="uint8")
    expected = softmax(padding.predict(images, verbose=0), axis=1)
    found = keras_vit.predict(padding, images)
    assert found.dtype == np.float64 and np.allclose(found, expected, atol=1e-6)
    assert np.allclose(keras_vit.predict(padding, list(images)), expected, atol=1e-6)
    assert keras_vit.predict(padding, images[:0]).shape == (0, 3)


def test_fewer_large_images_and_many_patches_are_predicted_at_once():
    shapes = [(32, 32, 3), (512, 512, 3), (8192, 8192, 3)]
    inputs = [keras.Model(x, x) for x in map(keras.Input, shapes)]
    assert list(map(prediction.batch_size, inputs)) == [256, 21, 1]
    small, many = tiny(), tiny((128, 128, 3))  # 65 and 1,025 tokens, 2 heads.
    assert list(map(prediction.batch_size, (small, many))) == [256, 127]


def test_files_are_read_as_the_model_was_trained(padding, tmp_path):
    """A square photo between transparent borders, by Pillow."""
    padding.save(tmp_path / "model.keras")
    model = keras_vit.load_model(tmp_path / "model.keras")
    assert model.resize == "pad"
    photo = Image.fromarray(
        np.random.default_rng(2).integers(0, 256, (32, 32, 4)).astype("uint8"), "RGBA"
    )
    photo.save(tmp_path / "photo.png")
    image = np.zeros((8, 12, 4), "uint8")
    image[:, 2:10] = photo.resize((8, 8), Image.BILINEAR)
    found = keras_vit.predict(model, [tmp_path / "photo.png", image, str(tmp_path / "photo.png")])
    expected = softmax(padding.predict(image[None], verbose=0), axis=1)
    assert np.allclose(found, expected, atol=1e-6)


def test_what_cannot_be_predicted_is_refused(padding, tmp_path):
    images = np.zeros((2, 8, 12, 3))
    with pytest.raises(ValueError, match=r"shape \(N, 8, 12, 4\).*images.shape=\(2, 8, 12, 3\)"):
        keras_vit.predict(padding, images)
    with pytest.raises(ValueError, match=r"Received: an image of shape \(8, 12, 3\)"):
        keras_vit.predict(padding, list(images))
    with pytest.raises(ValueError, match=r"list of paths, such as \['cat.jpg'\]"):
        keras_vit.predict(padding, "cat.jpg")
    with pytest.raises(keras_vit.data.ImageError, match="No such file"):
        keras_vit.predict(padding, [tmp_path / "gone.jpg"])
    with pytest.raises(ValueError, match="Received: resize='stretch'"):
        VisionTransformer(resize="stretch")
