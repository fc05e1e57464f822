"""Random crops resized to one size: the augmentation that image classifiers lean on most."""

import functools
import math

import keras

from keras_vit.arguments import positive_integer

ATTEMPTS = 10


@keras.saving.register_keras_serializable("keras_vit")
class RandomResizedCrop(keras.layers.RandomCrop):
    """Crops a random box out of every image and resizes it to one size.

    Each image of a batch gets a box of its own, drawn by the rule that made
    the augmentation known (Szegedy et al., 2015, and torchvision's
    `RandomResizedCrop`): the share of the area is uniform in `scale`, the
    aspect ratio log-uniform in `ratio`, the sides are rounded to whole pixels
    and the position is uniform. A box that does not fit into the image is
    drawn again, up to ten times; after that, the largest central box whose
    aspect ratio lies within `ratio` is taken.

    The box is resampled with half-pixel centres and never reads a pixel
    outside itself. Bilinear interpolation is antialiased when it shrinks, as
    Pillow's is. On a CPU, TensorFlow cuts out and resizes image by image.
    Elsewhere and under XLA a batch is resized by two products with small
    matrices, as resampling is separable and linear. Both have a gradient.

    With `training=False` the whole image is resized; images that have the
    target size already pass unchanged. Called on its own without `training`,
    the layer crops at random, as Keras's image layers do; a
    `VisionTransformer` crops in training only.

    **Note:** This layer is safe to use inside a `tf.data` pipeline, whichever
    backend Keras runs on.

    Input shape:
        3D tensor (one image) or 4D tensor (a batch): `(..., H, W, C)` with
        `"channels_last"`, `(..., C, H, W)` with `"channels_first"`. Integers
        or floats of any range; 0 to 255 by convention.

    Output shape:
        `(..., height, width, C)` or `(..., C, height, width)`, in the dtype
        that the layer computes in.

    Args:
        height: int, height of the output in pixels, at least 1.
        width: int, width of the output in pixels, at least 1.
        scale: pair of floats in (0, 1], smallest and largest share of the
            image's area that a box covers.
        ratio: pair of positive floats, smallest and largest aspect ratio
            (width over height) of a box.
        interpolation: `"bilinear"` or `"nearest"`.
        seed: int, makes the boxes reproducible.
        data_format: `"channels_last"` or `"channels_first"`; by default what
            the Keras configuration says.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.

    Raises:
        ValueError: if an argument lies outside the ranges above, or if the
            input has neither three nor four dimensions.

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
        super().__init__(
            positive_integer("height", height),
            positive_integer("width", width),
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
        draws = self.backend.random.uniform((batch_size, 2 * ATTEMPTS + 2), seed=seed)
        area_draws, ratio_draws = draws[:, :ATTEMPTS], draws[:, ATTEMPTS:-2]

        np = self.backend.numpy
        side = np.sqrt(image_height * image_width * _between(*self.scale, area_draws))
        low, high = (math.log(ratio) / 2 for ratio in self.ratio)
        slant = np.exp(_between(low, high, ratio_draws))
        sizes = np.round(np.stack([side / slant, side * slant], axis=2))

        # The central box always fits, so as the last candidate it is taken only if no draw fits.
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

    def transform_images(self, images, transformation, training=True):
        return self._resample(images, transformation, self.interpolation)

    def transform_segmentation_masks(self, segmentation_masks, transformation, training=True):
        return self._resample(segmentation_masks, transformation, "nearest")

    def transform_bounding_boxes(self, bounding_boxes, transformation, training=True):
        raise NotImplementedError(
            f"{self.__class__.__name__} is for classification: it transforms no bounding boxes."
        )

    def compute_output_shape(self, input_shape):
        if len(input_shape) not in (3, 4):
            raise ValueError(
                "Expected image tensor to have rank 3 (single image) or 4 (batch of images). "
                f"Received: data.shape={tuple(input_shape)}"
            )
        return super().compute_output_shape(input_shape)

    def get_config(self):
        return {
            **super().get_config(),
            "scale": self.scale,
            "ratio": self.ratio,
            "interpolation": self.interpolation,
        }

    def _resample(self, images, boxes, interpolation):
        """Resizes the boxes of a batch of images, or whole images where `boxes` is None."""
        if boxes is None:
            # Inside `tf.data` the size may be unknown until an image arrives.
            known_size = images.shape[self.height_axis], images.shape[self.width_axis]
            if known_size == (self.height, self.width):
                return self.backend.cast(images, self.compute_dtype)
            zero = self.backend.numpy.zeros((1,), "float32")
            shape = self.backend.shape(images)
            height = zero + self.backend.cast(shape[self.height_axis], "float32")
            width = zero + self.backend.cast(shape[self.width_axis], "float32")
            return self._multiply(images, (zero, zero, height, width), interpolation)
        if self.backend.name == "tensorflow" and _tensorflow_maps():
            return self._map(images, boxes, interpolation)
        return self._multiply(images, boxes, interpolation)

    def _map(self, images, boxes, interpolation):
        """Crops and resizes image by image: fast on TensorFlow's CPU, possible nowhere else."""
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
            (self.height, self.width),
            interpolation,
            antialias,
            self.data_format,
            images.dtype,
            self.compute_dtype,
        )

        # `MapDefun` has no gradient of its own.
        @tf.custom_gradient
        def crop_all(images):
            def gradient(upstream):
                with tf.GradientTape() as tape:
                    tape.watch(images)
                    crops = self._multiply(images, boxes, interpolation)
                return tape.gradient(crops, images, upstream)

            (crops,) = tf.raw_ops.MapDefun(
                arguments=[images, start, extent],
                captured_inputs=[],
                output_types=[self.compute_dtype],
                output_shapes=[self.compute_output_shape(images.shape)[1:]],
                f=crop_one,
            )
            return crops, gradient

        return crop_all(images)

    def _multiply(self, images, boxes, interpolation):
        """Resizes by a product with one matrix for the rows and one for the columns."""
        np = self.backend.numpy
        shape = self.backend.shape(images)
        top, left, height, width = boxes
        rows = self._matrix(top, height, shape[self.height_axis], self.height, interpolation)
        columns = self._matrix(left, width, shape[self.width_axis], self.width, interpolation)

        # Half precision would move a crop by up to a pixel, so that weights stay in float32.
        images = self.backend.cast(images, rows.dtype)
        if self.data_format == "channels_last":
            images = np.transpose(images, (0, 3, 1, 2))
        images = np.matmul(np.matmul(rows[:, None], images), np.swapaxes(columns, 1, 2)[:, None])
        if self.data_format == "channels_last":
            images = np.transpose(images, (0, 2, 3, 1))
        return self.backend.cast(images, self.compute_dtype)

    def _matrix(self, start, length, input_size, output_size, interpolation):
        """Weights of `input_size` pixels in `output_size` pixels along one side of the boxes.

        `start` and `length` have shape `(B,)`, the result `(B, output_size, input_size)`. Each
        row sums to one and is zero outside the box.
        """
        np = self.backend.numpy
        start, length = start[:, None, None], length[:, None, None]
        output = np.arange(output_size, dtype="float32")[None, :, None]
        source = np.arange(input_size, dtype="float32")[None, None, :] - start
        center = (output + 0.5) * length / output_size
        if interpolation == "nearest":
            weights = self.backend.cast(source == np.floor(center), "float32")
        else:
            support = np.maximum(length / output_size, 1.0)
            weights = np.maximum(1.0 - np.abs(source + 0.5 - center) / support, 0.0)
        weights = np.where((source >= 0) & (source < length), weights, 0.0)
        return weights / np.sum(weights, axis=2, keepdims=True)


def _tensorflow_maps():
    """Whether TensorFlow may map over images: XLA compiles no slices of unknown size."""
    import tensorflow as tf
    from tensorflow.python.ops import control_flow_util

    graph = tf.compat.v1.get_default_graph()
    under_xla = control_flow_util.GraphOrParentsInXlaContext(graph)
    return not under_xla and not tf.config.list_physical_devices("GPU")


@functools.cache
def _crop_of_one_image(size, interpolation, antialias, data_format, input_dtype, output_dtype):
    """A TensorFlow function from an image, and the start and extent of a box, to its crop."""
    import tensorflow as tf

    def crop(image, start, extent):
        box = tf.cast(tf.slice(image, start, extent), "float32")
        if data_format == "channels_first":
            box = tf.transpose(box, (1, 2, 0))
        box = tf.image.resize(box, size, interpolation, antialias=antialias)
        if data_format == "channels_first":
            box = tf.transpose(box, (2, 0, 1))
        return tf.cast(box, output_dtype)

    image, corner = tf.TensorSpec((None, None, None), input_dtype), tf.TensorSpec((3,), "int32")
    # Outside of the caller's graph, so that the function outlives it.
    with tf.init_scope():
        return tf.function(crop, autograph=False).get_concrete_function(image, corner, corner)


def _between(low, high, draws):
    """Moves draws from [0, 1) to [low, high)."""
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
