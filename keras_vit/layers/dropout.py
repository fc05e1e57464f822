"""Dropout from half as many random bits."""

import keras
from keras import ops

LEVELS = 2**16


@keras.saving.register_keras_serializable("keras_vit")
class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` that spends 16 random bits on a number instead of 32.

    The rate is rounded to a multiple of 1/65,536, and what stays is scaled by
    the rounded rate. On JAX the bits come from the device's own generator
    (`"rbg"`), which is several times as fast as the default one. On PyTorch,
    and with a `noise_shape`, Keras's own dropout is used.

    Input and output shapes, arguments and errors are those of
    `keras.layers.Dropout`.

    Example:

    >>> layer = keras_vit.layers.Dropout(0.2)
    >>> layer(np.ones((2, 5), "float32"), training=True).shape
    (2, 5)
    """

    def call(self, inputs, training=False):
        dropped = round(self.rate * LEVELS)
        draw = DRAWS.get(keras.backend.backend())
        if not training or not 0 < dropped < LEVELS or draw is None or self.noise_shape:
            return super().call(inputs, training=training)
        bits = draw(inputs, self.seed_generator.next())
        keep = bits >= ops.cast(dropped, bits.dtype)
        return _scale_kept(inputs, keep, LEVELS / (LEVELS - dropped))


def _draw_on_tensorflow(like, seed):
    """Uniform uint16 noise in the shape of a tensor; `seed` is a pair of integers."""
    import tensorflow as tf

    size = tf.size(like)
    pairs = tf.random.stateless_uniform(
        [(size + 1) // 2], tf.cast(seed, "int32"), minval=None, maxval=None, dtype="int32"
    )
    return tf.reshape(tf.reshape(tf.bitcast(pairs, "uint16"), [-1])[:size], tf.shape(like))


def _draw_on_jax(like, seed):
    """Uniform uint16 noise in the shape of a tensor; `seed` is a pair of integers."""
    import jax

    words = ops.cast(seed, "uint32")
    key = jax.random.wrap_key_data(ops.concatenate([words, words]), impl="rbg")
    return jax.random.bits(key, like.shape, "uint16")


DRAWS = {"tensorflow": _draw_on_tensorflow, "jax": _draw_on_jax}


def _scale_kept(inputs, keep, scale):
    """`inputs * scale` where `keep`, zero elsewhere; only `keep` is held for the gradient."""
    if keras.backend.backend() == "jax":
        return ops.where(keep, inputs * ops.cast(scale, inputs.dtype), 0)

    @ops.custom_gradient
    def masked(inputs):
        def apply(tensor):
            return tensor * ops.cast(keep, tensor.dtype) * ops.cast(scale, tensor.dtype)

        return apply(inputs), apply

    return masked(inputs)
