"""Normalization of pixels by the statistics of the training set, and layer normalization."""

import warnings
from collections.abc import Iterable

import keras
import numpy as np
from keras import ops

# Standard deviations below this fraction of the mean are rounding errors.
ROUNDING = 1e-6


@keras.saving.register_keras_serializable("keras_vit")
class Normalization(keras.layers.Layer):
    """Normalizes each channel to mean 0 and variance 1 over the training set.

    Unlike `keras.layers.Normalization`, it reads its weights whenever it is
    called, so that `adapt` and `set_weights` also take effect in functions
    that are already compiled. A constant channel is centered but not scaled, as
    in scikit-learn's `StandardScaler`.

    Input shape:
        `(B, ..., C)`, integers or floats of any range.

    Output shape:
        The same, in the dtype that the layer computes in.

    Attributes:
        mean: weight `(C,)`, 0 before `adapt`.
        variance: weight `(C,)`, 1 before `adapt`.

    Example:

    >>> layer = keras_vit.layers.Normalization()
    >>> layer.adapt([np.array([[0.0, 7.0], [4.0, 7.0]])])
    >>> layer(np.array([[4.0, 8.0]]))
    array([[1., 1.]], dtype=float32)
    """

    def build(self, input_shape):
        def add_statistic(name, initializer, shape=input_shape[-1:], dtype=None):
            return self.add_weight(
                name=name, shape=shape, initializer=initializer, dtype=dtype, trainable=False
            )

        self.mean = add_statistic("mean", "zeros")
        self.variance = add_statistic("variance", "ones")
        # Not read: the saved weights have it, as those of `keras.layers.Normalization` do.
        self.count = add_statistic("count", "zeros", (), "int")

    def adapt(self, batches: Iterable[np.ndarray]) -> None:
        """Computes mean and variance of each channel over all batches.

        A warning lists the constant channels.

        Args:
            batches: iterable of arrays `(B, ..., C)`.

        Raises:
            ValueError: if there is no batch.
        """
        count, mean, squares, origin = 0, 0.0, 0.0, None
        for batch in batches:
            if origin is None:
                if not self.built:
                    self.build(batch.shape)
                # Relative to one of its own pixels, a constant channel is exactly zero.
                origin = batch.reshape(-1, batch.shape[-1])[:1].T.astype("float64")
            # Channels first: NumPy sums contiguous rows faster, and pairwise, with small errors.
            pixels = np.array(np.moveaxis(batch, -1, 0), "float64", order="C")
            pixels = pixels.reshape(len(pixels), -1) - origin
            # Sums of squares are merged as by Chan, Golub & LeVeque (1983).
            size, own = pixels.shape[1], pixels.mean(axis=1)
            total = count + size
            squares += np.square(pixels - own[:, None]).sum(axis=1)
            squares += np.square(own - mean) * count * size / total
            mean += (own - mean) * size / total
            count = total
        if origin is None:
            raise ValueError("Expected at least one batch of images. Received: none")
        mean, variance = mean + origin[:, 0], squares / count
        self.mean.assign(mean)
        self.variance.assign(variance)
        constant = np.flatnonzero(np.sqrt(variance) <= ROUNDING * np.abs(mean))
        if constant.size:
            warnings.warn(
                f"Channels {constant.tolist()} of {len(mean)} (counted from 0) are constant in the "
                "training images: they are centered but not scaled.",
                stacklevel=2,
            )

    def call(self, inputs):
        mean = ops.convert_to_tensor(self.mean)
        return (ops.cast(inputs, self.compute_dtype) - mean) / self.scale

    @property
    def scale(self):
        """What each channel is divided by, a tensor `(C,)`; 1 for a constant channel."""
        mean, deviation = ops.convert_to_tensor(self.mean), ops.sqrt(self.variance)
        return ops.where(deviation <= ROUNDING * ops.abs(mean), 1.0, deviation)

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_vit")
class LayerNormalization(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization`, faster on TensorFlow's CPU and on PyTorch.

    On TensorFlow without a GPU, sums over the tokens and over their width are
    products with a vector of ones, which are several times faster than
    reductions, and the gradient is written out (Ba et al., 2016); products on
    a GPU might round to TF32. On PyTorch, its own function is used, which takes
    half precision and computes in float32 internally, where Keras would cast
    the input first. Everything else falls back to Keras.

    Input and output shapes, arguments and errors are those of
    `keras.layers.LayerNormalization`.

    Example:

    >>> tokens = np.random.normal(size=(8, 65, 256))
    >>> keras_vit.layers.LayerNormalization(epsilon=1e-6)(tokens).shape
    (8, 65, 256)
    """

    def call(self, inputs):
        last = self.axis in (-1, len(inputs.shape) - 1, [-1], [len(inputs.shape) - 1])
        affine = self.scale and self.center and not self.rms_scaling
        plain = last and affine and inputs.shape[-1] and self.compute_dtype != "float64"
        if plain and keras.backend.backend() == "torch":
            inputs = ops.cast(inputs, self.compute_dtype)
            return _normalize_in_torch(inputs, self.gamma, self.beta, self.epsilon)
        if not (plain and _on_tensorflow_cpu()):
            return super().call(inputs)
        width, shape = inputs.shape[-1], ops.shape(inputs)
        rows = ops.reshape(ops.cast(inputs, "float32"), (-1, width))
        gamma, beta = ops.cast(self.gamma, "float32"), ops.cast(self.beta, "float32")
        outputs = _normalize(rows, gamma, beta, self.epsilon)
        return ops.cast(ops.reshape(outputs, shape), self.compute_dtype)


def _on_tensorflow_cpu():
    if keras.backend.backend() != "tensorflow":
        return False
    import tensorflow as tf

    return not tf.config.list_physical_devices("GPU")


def _normalize_in_torch(inputs, gamma, beta, epsilon):
    import torch

    dtype = keras.backend.standardize_dtype(inputs.dtype)
    gamma, beta = ops.cast(gamma, dtype), ops.cast(beta, dtype)
    return torch.nn.functional.layer_norm(inputs, inputs.shape[-1:], gamma, beta, epsilon)


def _normalize(rows, gamma, beta, epsilon):
    """Rows `(N, D)` with mean zero and variance one, times `gamma`, plus `beta`."""
    width = rows.shape[-1]
    averaging = ops.full((width, 1), 1 / width, dtype="float32")

    @ops.custom_gradient
    def normalize(rows, gamma, beta):
        centered = rows - ops.matmul(rows, averaging)
        scale = ops.rsqrt(ops.matmul(centered * centered, averaging) + epsilon)
        normal = centered * scale

        def gradients(upstream):
            ones = ops.ones((1, ops.shape(rows)[0]), dtype="float32")
            products = upstream * normal
            weights = ops.reshape(gamma, (width, 1)) / width
            shift, tilt = ops.matmul(upstream, weights), ops.matmul(products, weights)
            to_rows = scale * (upstream * gamma - shift - normal * tilt)
            return to_rows, ops.matmul(ones, products)[0], ops.matmul(ones, upstream)[0]

        return normal * gamma + beta, gradients

    return normalize(rows, gamma, beta)
