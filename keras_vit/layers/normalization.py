"""Normalization of pixels by what they were in training, and of tokens by their own numbers."""

import warnings
from collections.abc import Iterable

import keras
import numpy as np
from keras import ops

# Below this part of its mean, the deviation of a channel is rounding.
ROUNDING = 1e-6


@keras.saving.register_keras_serializable("keras_vit")
class Normalization(keras.layers.Layer):
    """Moves and scales each channel to the mean 0 and the variance 1 that it has in training.

    Unlike `keras.layers.Normalization`, it reads its weights whenever it is
    called: `adapt` and `set_weights` also count in functions that are already
    compiled. A channel that does not vary is centred and not scaled, as by
    scikit-learn's `StandardScaler`.

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
        def add_number(name, initializer, shape=input_shape[-1:], dtype=None):
            return self.add_weight(
                name=name, shape=shape, initializer=initializer, dtype=dtype, trainable=False
            )

        self.mean = add_number("mean", "zeros")
        self.variance = add_number("variance", "ones")
        # Unused; `keras.layers.Normalization` has it, which files of earlier versions hold.
        self.count = add_number("count", "zeros", (), "int")

    def adapt(self, batches: Iterable[np.ndarray]) -> None:
        """Learns mean and variance of each channel, of all batches together.

        A warning names the channels that do not vary.

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
                # Seen from a pixel of its own, a channel that does not vary is exactly zero.
                origin = batch.reshape(-1, batch.shape[-1])[:1].T.astype("float64")
            # By channel, which NumPy sums faster, and in pairs, so that little is rounded.
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
                f"Of {len(mean)} channels, counted from 0, {', '.join(map(str, constant))} do not "
                "vary in the training images: they are centred and not scaled.",
                stacklevel=2,
            )

    def call(self, inputs):
        mean, deviation = ops.convert_to_tensor(self.mean), ops.sqrt(self.variance)
        scale = ops.where(deviation <= ROUNDING * ops.abs(mean), 1.0, deviation)
        return (ops.cast(inputs, self.compute_dtype) - mean) / scale

    def compute_output_shape(self, input_shape):
        return input_shape


@keras.saving.register_keras_serializable("keras_vit")
class LayerNormalization(keras.layers.LayerNormalization):
    """`keras.layers.LayerNormalization`, faster on TensorFlow's CPU and on PyTorch.

    On TensorFlow without a GPU, sums over the tokens and over their width are
    products with a vector of ones, which run several times as fast as
    reductions, and the gradient is written out (Ba et al., 2016); a GPU's
    products may round to TF32. PyTorch's own function takes tokens of half
    precision as they are and computes in float32 inside, where Keras would
    convert them first. Everywhere else, Keras's own computation is used.

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
