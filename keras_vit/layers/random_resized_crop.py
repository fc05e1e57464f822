"""Random resized crops, the standard augmentation of image classifiers."""

import functools
import math

import keras

from keras_vit.layers.pipelines import PipelineLayer
from keras_vit.validation import positive_integer

ATTEMPTS = 10
MASKS = "segmentation_masks"


@keras.saving.register_keras_serializable("keras_vit")
class RandomResizedCrop(PipelineLayer, keras.layers.RandomCrop):
    """Crops a random box out of every image and resizes it to one size.

    Each image of a batch gets its own box, drawn by the usual rule (Szegedy et
    al., 2015, and torchvision's `RandomResizedCrop`): the fraction of the area
    is uniform in `scale`, the aspect ratio log-uniform in `ratio`, the sides
    are rounded to whole pixels and the position is uniform. A box that does
    not fit into the image is redrawn, up to ten times; after that, the largest
    central box with an aspect ratio within `ratio` is used.

    The box is resampled with half-pixel centers and never reads pixels outside
    of it. Bilinear interpolation is antialiased when downscaling, as in Pillow.
    On a CPU, TensorFlow crops and resizes image by image. Elsewhere, and under
    XLA, a batch is resized by two small matrix products, because resampling is
    separable and linear. Both are differentiable.

    With `training=False`, the whole image is resized; images that already have
    the target size pass unchanged. Called on its own without `training`,
    the layer crops at random, as Keras's image layers do; a
    `VisionTransformer` crops in training only.

    Segmentation masks in a dictionary with their images are cropped with the
    same boxes, by nearest-neighbor interpolation, so that they keep their ids
    and their dtype. Labels pass unchanged. Bounding boxes are not supported.

    **Note:** This layer is safe to use inside a `tf.data` pipeline, whichever
    backend Keras runs on.

    Input shape:
        3D tensor (one image) or 4D tensor (a batch): `(..., H, W, C)` with
        `"channels_last"`, `(..., C, H, W)` with `"channels_first"`. Integers
        or floats of any range; 0 to 255 by convention. Or a dictionary of
        such `"images"` and, optionally, `"segmentation_masks"` of the same
        rank, height and width, and `"labels"`.

    Output shape:
        `(..., height, width, C)` or `(..., C, height, width)`, in the dtype
        that the layer computes in; integers are rounded. A dictionary for a
        dictionary.

    Args:
        height: int, height of the output in pixels, at least 1.
        width: int, width of the output in pixels, at least 1.
        scale: pair of floats in (0, 1], smallest and largest fraction of
            the image's area that a box covers.
        ratio: pair of positive floats, smallest and largest aspect ratio
            (width over height) of a box.
        interpolation: `"bilinear"` or `"nearest"`.
        seed: int, makes the boxes reproducible.
        data_format: `"channels_last"` or `"channels_first"`; by default
            that of the Keras configuration.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.

    Raises:
        ValueError: if an argument is out of range, if the input has neither
            three nor four dimensions, or if it contains bounding boxes, or
            masks that do not have the size of their images.

    Example:

    >>> images = np.random.uniform(0, 255, (8, 40, 48, 3))
    >>> crop = keras_vit.RandomResizedCrop(32, 32, scale=(0.8, 1.0))
    >>> crop(images, training=True).shape
    (8, 32, 32, 3)
    """

    def __init__(
        self,
        height: int,
        width: int,
        scale: tuple[float, float] = (0.8, 1.0),
        ratio: tuple[float, float] = (0.9, 1.1),
        interpolation: str = "bilinear",
        seed: int | None = None,
        data_format: str | None = None,
        **kwargs,
    ):
        if "bounding_box_format" in kwargs:
            raise ValueError(
                f"{self.__class__.__name__} does not support bounding boxes: leave out "
                "`bounding_box_format`. "
                f"Received: bounding_box_format={kwargs['bounding_box_format']!r}"
            )
        super().__init__(
            height=positive_integer("height", height),
            width=positive_integer("width", width),
            seed=seed,
            data_format=data_format,
            **kwargs,
        )
        self.scale = _range("scale", scale, upper=1.0)
        self.ratio = _range("ratio", ratio, upper=math.inf)
        if interpolation not in ("bilinear", "nearest"):
            raise ValueError(
                "Expected `interpolation` to be 'bilinear' or 'nearest'. "
                f"Received: interpolation={interpolation!r}"
            )
        self.interpolation = interpolation
        self.seed = seed
        self.supports_jit = True

    def get_random_transformation(self, data, training=True, seed=None):
        """Boxes as four tensors of shape `(B,)`: top, left, height and width in pixels."""
        if not training:
            return None
        images = data["images"] if isinstance(data, dict) else data
        self._is_batched(images)
        shape = self.backend.shape(images)
        batch_size = 1 if len(shape) == 3 else shape[0]
        image_height = self.backend.cast(shape[self.height_axis], "float32")
        image_width = self.backend.cast(shape[self.width_axis], "float32")
        if seed is None:
            seed = self._get_seed_generator(self.backend.name)
        shape = batch_size, 2 * ATTEMPTS + 2
        draws = self.backend.random.uniform(shape, dtype="float32", seed=seed)
        area_draws, ratio_draws = draws[:, :ATTEMPTS], draws[:, ATTEMPTS:-2]

        np = self.backend.numpy
        side = np.sqrt(image_height * image_width * _between(*self.scale, area_draws))
        low, high = (math.log(ratio) / 2 for ratio in self.ratio)
        slant = np.exp(_between(low, high, ratio_draws))
        sizes = np.round(np.stack([side / slant, side * slant], axis=2))

        # The central box always fits: as the last candidate, it is used only if no draw fits.
        image_size = np.stack([image_height, image_width])
        central = np.stack([image_width / self.ratio[0], image_height * self.ratio[1]])
        central = np.clip(np.round(central), 1, image_size)
        sizes = np.concatenate([sizes, np.zeros_like(sizes[:, :1]) + central], axis=1)
        fits = np.all((sizes >= 1) & (sizes <= image_size), axis=2)
        index = np.argmax(self.backend.cast(fits, "int32"), axis=1)
        chosen = self.backend.nn.one_hot(index, ATTEMPTS + 1, dtype="float32")
        size = np.sum(sizes * chosen[:, :, None], axis=1)

        room = image_size - size
        # A draw just below one can round up to `room + 1`.
        anywhere = np.minimum(np.floor(draws[:, -2:] * (room + 1)), room)
        start = np.where(index[:, None] == ATTEMPTS, np.floor(room / 2), anywhere)
        return start[:, 0], start[:, 1], size[:, 0], size[:, 1]

    def call(self, data, training=True):
        if isinstance(data, dict):
            self._check(data)
            data = dict(data)
        return super().call(data, training=training)

    def transform_images(self, images, transformation, training=True):
        resampled = self._resample(images, transformation, self.interpolation)
        return self._to_compute_dtype(resampled)

    def transform_segmentation_masks(self, segmentation_masks, transformation, training=True):
        masks = self.backend.convert_to_tensor(segmentation_masks)
        return self._resample(masks, transformation, "nearest")

    def compute_output_shape(self, input_shape):
        if len(input_shape) not in (3, 4):
            raise ValueError(
                "Expected image tensor to have rank 3 (single image) or 4 (batch of images). "
                f"Received: data.shape={tuple(input_shape)}"
            )
        return super().compute_output_shape(input_shape)

    def compute_output_spec(self, data, training=True):
        if not isinstance(data, dict):
            return super().compute_output_spec(data)
        self._check(data)
        specs = {name: keras.KerasTensor(x.shape, x.dtype) for name, x in data.items()}
        specs["images"] = super().compute_output_spec(data["images"])
        if MASKS in data:
            specs[MASKS] = keras.KerasTensor(
                self.compute_output_shape(data[MASKS].shape), data[MASKS].dtype
            )
        return specs

    def get_config(self):
        return {
            **super().get_config(),
            "scale": self.scale,
            "ratio": self.ratio,
            "interpolation": self.interpolation,
        }

    def _check(self, data):
        """Raises a `ValueError` for a dictionary that the layer cannot crop."""
        name = self.__class__.__name__
        if "images" not in data:
            raise ValueError(
                f"Expected a dictionary with 'images' for {name}. Received: keys={sorted(data)}"
            )
        if "bounding_boxes" in data:
            raise ValueError(
                f"{name} does not support bounding boxes. Expected a dictionary of 'images', "
                f"'segmentation_masks' and 'labels'. Received: keys={sorted(data)}"
            )
        if MASKS not in data:
            return
        images, masks = tuple(data["images"].shape), tuple(data[MASKS].shape)
        axes = self.height_axis, self.width_axis
        if len(images) != len(masks) or any(
            None not in (images[axis], masks[axis]) and images[axis] != masks[axis] for axis in axes
        ):
            raise ValueError(
                "Expected segmentation masks with the rank, height and width of their images. "
                f"Received: images.shape={images}, segmentation_masks.shape={masks}"
            )

    def _resample(self, images, boxes, interpolation):
        """Resizes the boxes of a batch of images, or whole images if `boxes` is None.

        With `"nearest"` the images keep their dtype; with `"bilinear"` they become float32.
        """
        maps = boxes is not None and self.backend.name == "tensorflow" and _tensorflow_maps()
        if boxes is None:
            # Inside `tf.data` the size may be unknown until an image arrives.
            known_size = images.shape[self.height_axis], images.shape[self.width_axis]
            if known_size == (self.height, self.width):
                return images
            shape = self.backend.shape(images)
            zeros = self.backend.numpy.zeros((shape[0],), "float32")
            height = zeros + self.backend.cast(shape[self.height_axis], "float32")
            width = zeros + self.backend.cast(shape[self.width_axis], "float32")
            boxes = zeros, zeros, height, width
        if interpolation == "nearest":
            return self._take(images, boxes)
        return self._map(images, boxes) if maps else self._multiply(images, boxes)

    def _take(self, images, boxes):
        """Takes the nearest pixel of the box for each pixel of the output."""
        np = self.backend.numpy
        top, left, height, width = boxes
        if self.data_format == "channels_first":
            images = np.transpose(images, (0, 2, 3, 1))
        count, rows, columns, channels = self.backend.shape(images)
        row = top[:, None] + np.floor(_centers(np, height, self.height))
        column = left[:, None] + np.floor(_centers(np, width, self.width))
        row, column = (self.backend.cast(index, "int32") for index in (row, column))
        first = rows * columns * np.arange(count, dtype="int32")[:, None, None]
        index = first + row[:, :, None] * columns + column[:, None, :]
        pixels = np.reshape(images, (count * rows * columns, channels))
        images = np.take(pixels, index, axis=0)
        if self.data_format == "channels_first":
            images = np.transpose(images, (0, 3, 1, 2))
        return images

    def _map(self, images, boxes):
        """Crops and resizes image by image: fast on TensorFlow's CPU, and only available there."""
        import tensorflow as tf

        top, left, height, width = boxes
        first, every = tf.zeros_like(top), -tf.ones_like(top)
        if self.data_format == "channels_last":
            start, extent = (top, left, first), (height, width, every)
        else:
            start, extent = (first, top, left), (every, height, width)
        start, extent = (tf.cast(tf.stack(side, axis=1), "int32") for side in (start, extent))

        # Antialiasing takes twice the time and changes nothing where no box can shrink.
        known_size = images.shape[self.height_axis], images.shape[self.width_axis]
        antialias = None in known_size or known_size[0] > self.height or known_size[1] > self.width
        crop_one = _crop_of_one_image(
            (self.height, self.width), antialias, self.data_format, images.dtype
        )

        # `MapDefun` has no gradient of its own.
        @tf.custom_gradient
        def crop_all(images):
            def gradient(upstream):
                with tf.GradientTape() as tape:
                    tape.watch(images)
                    crops = self._multiply(images, boxes)
                return tape.gradient(crops, images, upstream)

            (crops,) = tf.raw_ops.MapDefun(
                arguments=[images, start, extent],
                captured_inputs=[],
                output_types=["float32"],
                output_shapes=[self.compute_output_shape(images.shape)[1:]],
                f=crop_one,
            )
            return crops, gradient

        return crop_all(images)

    def _multiply(self, images, boxes):
        """Resizes by a product with one matrix for the rows and one for the columns."""
        top, left, height, width = boxes
        # Half precision would shift a crop by up to a pixel: weights stay in float32.
        images = self.backend.cast(images, "float32")
        images = self._resize_axis(images, self.height_axis, top, height, self.height)
        return self._resize_axis(images, self.width_axis, left, width, self.width)

    def _resize_axis(self, images, axis, start, length, output_size):
        np = self.backend.numpy
        images = np.moveaxis(images, axis, 1)
        count, input_size, *others = self.backend.shape(images)
        matrices = _matrices(np, start, length, input_size, output_size)
        # With broadcast channels, oneDNN's matmul in TensorFlow 2.21 overruns its buffers.
        pixels = np.reshape(images, (count, input_size, others[0] * others[1]))
        images = np.reshape(np.matmul(matrices, pixels), (count, output_size, *others))
        return np.moveaxis(images, 1, axis)


def _matrices(np, start, length, input_size, output_size):
    """Weights of `input_size` pixels in `output_size` pixels along one side of the boxes.

    `start` and `length` have shape `(B,)`, the result `(B, output_size, input_size)`. Each row
    sums to one and is zero outside the box.
    """
    center = _centers(np, length, output_size)[:, :, None]
    start, length = start[:, None, None], length[:, None, None]
    source = np.arange(input_size, dtype="float32") - start
    support = np.maximum(length / output_size, 1.0)
    weights = np.maximum(1.0 - np.abs(source + 0.5 - center) / support, 0.0)
    weights = np.where((source >= 0) & (source < length), weights, 0.0)
    return weights / np.sum(weights, axis=2, keepdims=True)


def _centers(np, length, output_size):
    """Where the centres of `output_size` pixels lie in boxes, in pixels: `(B, output_size)`."""
    return (np.arange(output_size, dtype="float32") + 0.5) * length[:, None] / output_size


def _tensorflow_maps():
    """Whether TensorFlow can map over images: XLA cannot compile slices of unknown size."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    graph = tf.compat.v1.get_default_graph()
    under_xla = control_flow_util.GraphOrParentsInXlaContext(graph)
    return not under_xla and not tf.config.list_physical_devices("GPU")


@functools.cache
def _crop_of_one_image(size, antialias, data_format, dtype):
    """A TensorFlow function from an image, and the start and extent of a box, to its crop."""
    import tensorflow as tf

    def crop(image, start, extent):
        box = tf.cast(tf.slice(image, start, extent), "float32")
        if data_format == "channels_first":
            box = tf.transpose(box, (1, 2, 0))
        box = tf.image.resize(box, size, antialias=antialias)
        if data_format == "channels_first":
            box = tf.transpose(box, (2, 0, 1))
        return box

    image, corner = tf.TensorSpec((None, None, None), dtype), tf.TensorSpec((3,), "int32")
    # Outside of the caller's graph, so that the function outlives it.
    with tf.init_scope():
        return tf.function(crop, autograph=False).get_concrete_function(image, corner, corner)


def _between(low, high, draws):
    """Scales uniform draws from [0, 1) to [low, high)."""
    return low + (high - low) * draws


def _range(name, value, upper):
    """`value` as a pair of floats with 0 < low <= high <= upper."""
    limit = "" if upper == math.inf else f" <= {upper:g}"
    try:
        low, high = (float(number) for number in value)
        valid = 0 < low <= high <= upper and high < math.inf
    except (TypeError, ValueError):
        valid = False
    if not valid:
        raise ValueError(
            f"Expected `{name}` to be a pair of numbers (low, high) with 0 < low <= high{limit}. "
            f"Received: {name}={value!r}"
        )
    return low, high
