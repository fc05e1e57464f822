"""Layer normalization, computed as each backend does it fastest."""

import keras
from keras import ops


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
        plain = last and affine and inputs.shape[-1]
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
    averaging = ops.full((width, 1), 1 / width)

    @ops.custom_gradient
    def normalize(rows, gamma, beta):
        centered = rows - ops.matmul(rows, averaging)
        scale = ops.rsqrt(ops.matmul(centered * centered, averaging) + epsilon)
        normal = centered * scale

        def gradients(upstream):
            ones = ops.ones((1, ops.shape(rows)[0]))
            products = upstream * normal
            weights = ops.reshape(gamma, (width, 1)) / width
            shift, tilt = ops.matmul(upstream, weights), ops.matmul(products, weights)
            to_rows = scale * (upstream * gamma - shift - normal * tilt)
            return to_rows, ops.matmul(ones, products)[0], ops.matmul(ones, upstream)[0]

        return normal * gamma + beta, gradients

    return normalize(rows, gamma, beta)
