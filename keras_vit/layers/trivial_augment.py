"""TrivialAugment: one random transformation per training image, batched and inside the model."""

import math

import keras

from keras_vit.layers.pipelines import PipelineLayer

KINDS = (
    *("identity", "shear_x", "shear_y", "translate_x", "translate_y", "rotate"),
    *("brightness", "color", "contrast", "sharpness"),
    *("posterize", "solarize", "autocontrast", "equalize"),
)
# Weights of red, green and blue in the luma of an image (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)


@keras.saving.register_keras_serializable("keras_vit")
class TrivialAugment(PipelineLayer):
    """Applies one random transformation of random strength to each training image.

    The fourteen transformations and their strengths are those of
    TrivialAugment's wide search space (Müller & Hutter, 2021,
    arXiv:2103.10158): identity, shear by up to 0.99, translation by up to 32
    pixels, rotation by up to 135 degrees, brightness, color, contrast and
    sharpness by a factor of 0.01 to 1.99, posterize to two bits or more,
    solarize, autocontrast and equalize. There is nothing to tune.

    Each image of a batch gets its own transformation and strength, while
    Keras's `RandAugment` transforms a whole batch in the same way. Shear and
    rotation are about the center, with bilinear interpolation; pixels from
    outside are black.

    Without `training=True`, images pass unchanged.

    **Note:** This layer is safe to use inside a `tf.data` pipeline, whichever
    backend Keras runs on.

    Input shape:
        4D tensor `(B, H, W, C)` or one image `(H, W, C)`, integers or floats
        from 0 to 255. Images with three channels are taken as RGB.

    Output shape:
        The same, in the dtype that the layer computes in; integers are
        rounded.

    Args:
        seed: int, makes the draws reproducible.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.

    Raises:
        ValueError: if the input has neither three nor four dimensions, or no
            known height, width and number of channels.

    Example:

    >>> images = np.random.uniform(0, 255, (8, 32, 32, 3))
    >>> keras_vit.TrivialAugment()(images, training=True).shape
    (8, 32, 32, 3)
    """

    def __init__(self, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        self.input_spec = keras.layers.InputSpec(min_ndim=3, max_ndim=4)
        self.seed = seed
        self.generator = keras.random.SeedGenerator(seed)

    def call(self, images, training=False):
        images = self.backend.convert_to_tensor(images)
        if not training:
            return self._to_compute_dtype(images)
        if None in images.shape[-3:]:
            raise ValueError(
                "Expected images with a known height, width and number of channels. "
                f"Received: images.shape={tuple(images.shape)}"
            )
        if len(images.shape) == 3:
            return self.call(images[None], training)[0]
        count, random = self.backend.shape(images)[0], self.backend.random
        seed = self._get_seed_generator(self.backend.name)
        kind = random.randint((count,), 0, len(KINDS), seed=seed)
        strength = random.uniform((count,), -1, 1, dtype="float32", seed=seed)
        return self._to_compute_dtype(distort(images, kind, strength, self.backend))

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {**super().get_config(), "seed": self.seed}


def distort(images, kind, strength, backend):
    """Applies one transformation to each image.

    Args:
        images: tensor `(B, H, W, C)`, 0 to 255.
        kind: integer tensor `(B,)`, indices of `KINDS`.
        strength: tensor `(B,)`, -1 to 1. For a kind without a direction, its absolute value
            is used.
        backend: Keras backend module to compute with.

    Returns:
        Tensor `(B, H, W, C)` of float32.
    """
    np = backend.numpy
    images, strength = backend.cast(images, "float32"), backend.cast(strength, "float32")
    kind = backend.cast(kind, "int32")

    def chosen(name):
        """1 for the images of a kind and 0 for the others, `(B,)`."""
        return backend.cast(kind == KINDS.index(name), "float32")

    def amount(name):
        """The strength for the images of a kind and 0 for the others, `(B,)`."""
        return chosen(name) * strength

    def of_image(values):
        return values[:, None, None, None]

    def only(name, changed):
        """The changed images where they are of a kind, the others as they were."""
        return np.where(of_image(kind == KINDS.index(name)), changed, images)

    # Each image is changed by one of these lines and unchanged by the others.
    angle = math.radians(135) * amount("rotate")
    images = transformed(
        images,
        [
            [np.cos(angle), 0.99 * amount("shear_x") - np.sin(angle)],
            [0.99 * amount("shear_y") + np.sin(angle), np.cos(angle)],
        ],
        [32 * amount("translate_x"), 32 * amount("translate_y")],
        backend,
    )

    grey = _grey(images, np)
    other = (
        of_image(chosen("color")) * grey
        + of_image(chosen("contrast")) * np.mean(grey, axis=(1, 2, 3), keepdims=True)
        + of_image(chosen("sharpness")) * smoothed(images, np)
    )
    blends = sum(amount(name) for name in ("brightness", "color", "contrast", "sharpness"))
    blended = images + of_image(0.99 * blends) * (images - other)
    images = np.clip(blended, 0, 255)

    size = np.abs(strength)
    step = of_image(2 ** np.round(6 * size))
    images = only("posterize", np.floor(images / step) * step)
    images = only("solarize", np.where(images < of_image(255 * (1 - size)), images, 255 - images))
    images = only("autocontrast", stretched(images, np))
    return only("equalize", flattened(images, backend))


def transformed(images, matrix, shift, backend):
    """Applies an affine transformation with bilinear interpolation; pixels from outside are black.

    Args:
        images: tensor `(B, H, W, C)`.
        matrix: two rows of two tensors `(B,)`. With `shift`, it maps the position of an output
            pixel, as x and y from the center, to its position in the input.
        shift: two tensors `(B,)`, in pixels.
        backend: Keras backend module to compute with.
    """
    np = backend.numpy
    _, height, width, channels = images.shape
    x = np.arange(width, dtype="float32")[None, None, :] - (width - 1) / 2
    y = np.arange(height, dtype="float32")[None, :, None] - (height - 1) / 2
    (x_of_x, x_of_y), (y_of_x, y_of_y) = ((c[:, None, None] for c in row) for row in matrix)
    left, top = (values[:, None, None] for values in shift)
    column = x_of_x * x + x_of_y * y + left + (width - 1) / 2
    row = y_of_x * x + y_of_y * y + top + (height - 1) / 2

    # Indexing a flat list of pixels takes a third of the time of `take_along_axis`.
    pixels = np.reshape(images, (-1, channels))
    first = height * width * np.arange(backend.shape(images)[0], dtype="int32")[:, None, None]
    first_row, first_column = np.floor(row), np.floor(column)
    total = 0.0
    for r in (first_row, first_row + 1):
        for c in (first_column, first_column + 1):
            weight = (1 - np.abs(row - r)) * (1 - np.abs(column - c))
            inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
            index = np.clip(r, 0, height - 1) * width + np.clip(c, 0, width - 1)
            pixel = np.take(pixels, first + backend.cast(index, "int32"), axis=0)
            total = total + np.where(inside, weight, 0.0)[:, :, :, None] * pixel
    return total


def smoothed(images, np):
    """3x3 mean filter whose center has weight 5; the borders are unchanged."""
    if min(images.shape[1:3]) < 3:
        return images
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    squares = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    middle = (squares + 4 * images[:, 1:-1, 1:-1]) / 13
    middle = np.concatenate([images[:, 1:-1, :1], middle, images[:, 1:-1, -1:]], axis=2)
    return np.concatenate([images[:, :1], middle, images[:, -1:]], axis=1)


def stretched(images, np):
    """Autocontrast: stretches each channel of each image to the range 0 to 255."""
    low = np.min(images, axis=(1, 2), keepdims=True)
    high = np.max(images, axis=(1, 2), keepdims=True)
    return np.where(high > low, (images - low) * 255 / np.maximum(high - low, 1e-6), images)


def flattened(images, backend):
    """Histogram equalization: maps each of 256 values to the fraction of darker pixels."""
    np = backend.numpy
    batch_size = backend.shape(images)[0]
    _, height, width, channels = images.shape
    values = backend.cast(np.clip(np.round(images), 0, 255), "int32")
    values = np.reshape(np.transpose(values, (0, 3, 1, 2)), (-1, height * width))
    histograms = batch_size * channels
    bins = values + 256 * np.arange(histograms, dtype="int32")[:, None]
    counts = backend.math.segment_sum(
        np.ones_like(np.reshape(bins, (-1,))), np.reshape(bins, (-1,)), 256 * histograms
    )
    counts = np.reshape(counts, (-1, 256))
    # As in Pillow, in integers: the pixels of the brightest value are not counted.
    brightest = np.max(values, axis=1, keepdims=True)
    of_brightest = np.take_along_axis(counts, brightest, axis=1)
    step = (height * width - of_brightest) // 255
    darker = np.cumsum(counts, axis=1) - counts
    table = np.minimum((darker + step // 2) // np.maximum(step, 1), 255)
    equalized = np.take(np.reshape(table, (-1,)), bins, axis=0)
    equalized = np.where(step > 0, equalized, values)
    equalized = np.reshape(backend.cast(equalized, "float32"), (-1, channels, height, width))
    return np.transpose(equalized, (0, 2, 3, 1))


def _grey(images, np):
    """Brightness `(B, H, W, 1)` of images."""
    if images.shape[-1] != 3:
        return np.mean(images, axis=-1, keepdims=True)
    return np.sum(images * np.array(LUMA, "float32"), axis=-1, keepdims=True)
