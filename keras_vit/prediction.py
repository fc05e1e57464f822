"""Class probabilities of images: arrays, or files read as the model wants them."""

import math
import os
import typing
from collections.abc import Sequence

import keras
import numpy as np

from keras_vit.data.images import read_image
from keras_vit.data.streaming import StreamedImages
from keras_vit.model import MOST_SCORES, VisionTransformer

# Images that are predicted at once, and their values at most.
BATCH_SIZE, MOST_VALUES = 256, 2**24


def predict(
    model: keras.Model,
    images: np.ndarray | StreamedImages | Sequence[str | os.PathLike[str] | np.ndarray],
) -> np.ndarray:
    """Class probabilities of images.

    Args:
        model: a `VisionTransformer`, or another model from raw pixels to logits.
        images: array `(N, H, W, C)` of raw pixels, 0 to 255, in the model's input shape, or the
            `StreamedImages` of a `Dataset`; or a list of paths of image files and of arrays
            `(H, W, C)`. Files are read in the size, the channels and the way of resizing of the
            model.

    Returns:
        float64 array `(N, num_classes)`; each row sums to one.

    Raises:
        ImageError: if a file cannot be read.
        ValueError: if the images do not have the model's input shape.

    Example:

    >>> model = keras_vit.load_model("runs/photos/model.keras")
    >>> probabilities = keras_vit.predict(model, ["cat.jpg", "dog.jpg"])
    >>> [model.class_names[label] for label in probabilities.argmax(axis=1)]
    ['cat', 'dog']
    """
    if isinstance(images, (str, os.PathLike)):
        raise ValueError(
            f"Expected `images` to be a list of paths, such as [{str(images)!r}]. "
            f"Received: images={images!r}"
        )
    parts = [np.empty((0, model.output_shape[-1]))]
    size = batch_size(model)
    for start in range(0, len(images), size):
        batch: typing.Any = images[start : start + size]
        if not hasattr(batch, "shape"):
            batch = _stacked(model, batch)
        expected = model.input_shape[1:]
        if tuple(batch.shape[1:]) != expected:
            shape = ", ".join(map(str, expected))
            raise ValueError(
                f"Expected `images` to have the shape (N, {shape}). "
                f"Received: images.shape={(len(images), *batch.shape[1:])}"
            )
        # On TensorFlow, `predict` uses `tf.data`, whose autotuning thread delays its return.
        logits = model.predict_on_batch(batch).astype("float64")
        exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
        parts.append(exponentials / exponentials.sum(axis=1, keepdims=True))
    return np.concatenate(parts)


def batch_size(model):
    """How many images a model predicts at once."""
    largest = MOST_VALUES // math.prod(model.input_shape[1:])
    if isinstance(model, VisionTransformer):
        largest = min(largest, MOST_SCORES // model.scores_per_block)
    return max(1, min(BATCH_SIZE, largest))


def read_for(model: keras.Model, path: str | os.PathLike[str]) -> np.ndarray:
    """An image file as a model takes it: uint8 array `(H, W, C)`."""
    height, width, channels = model.input_shape[1:]
    # Models of other classes do not say how their images were resized.
    return read_image(path, (height, width), channels, getattr(model, "resize", "squash"))


def _stacked(model, images):
    """Paths and arrays as one array `(B, H, W, C)`."""
    arrays = [
        read_for(model, image) if isinstance(image, (str, os.PathLike)) else np.asarray(image)
        for image in images
    ]
    if shapes := {array.shape for array in arrays} - {tuple(model.input_shape[1:])}:
        raise ValueError(
            f"Expected `images` to have the shape {tuple(model.input_shape[1:])} each. "
            f"Received: an image of shape {min(shapes)}"
        )
    return np.stack(arrays)
