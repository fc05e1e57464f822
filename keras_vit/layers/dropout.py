"""Dropout with random numbers that are cheap to compute."""

import functools
import math

import keras
from keras import ops

LEVELS = 2**32


@keras.saving.register_keras_serializable("keras_vit")
class Dropout(keras.layers.Dropout):
    """`keras.layers.Dropout` whose random numbers are a hash of their position.

    A random number generator writes its numbers to memory, and the mask is kept
    for the gradient. A hash of seed and position needs neither: XLA fuses it
    into the loop that applies it, and the gradient recomputes it. This is used
    on TensorFlow, where only the dropout is compiled, and on JAX. On PyTorch,
    and with a `noise_shape`, Keras's own dropout is used.

    Position and seed are mixed by MurmurHash3's finalizer (Appleby, 2011).
    The rate is rounded to a multiple of `2**-32`.

    Input and output shapes, arguments and errors are those of
    `keras.layers.Dropout`.

    Example:

    >>> layer = keras_vit.layers.Dropout(0.2)
    >>> layer(np.ones((2, 5), "float32"), training=True).shape
    (2, 5)
    """

    def call(self, inputs, training=False):
        dropped = round(self.rate * LEVELS)
        apply = APPLIERS.get(keras.backend.backend())
        if not training or not 0 < dropped < LEVELS or apply is None or self.noise_shape:
            return super().call(inputs, training=training)
        seed = ops.cast(self.seed_generator.next(), "uint32")
        return apply(inputs, seed, dropped)


def hashed(count, seed):
    """Uniform random uint32 numbers `(count,)` from a seed of two uint32 words."""
    # Seeds of consecutive steps differ by one; mixing changes half of their bits.
    key = _mixed(_mixed(seed[0]) + seed[1])
    x = ops.cast(ops.arange(count, dtype="int32"), "uint32")
    return _mixed(x * _word(0x9E3779B9) + key, between=_mixed(key))


def _mixed(x, between=None):
    """The finalizer of MurmurHash3, with an optional term added between its multiplications."""
    x = _folded(x, 16) * _word(0x85EBCA6B)
    if between is not None:
        x = x + between
    return _folded(_folded(x, 13) * _word(0xC2B2AE35), 16)


def _folded(x, bits):
    return ops.bitwise_xor(x, ops.right_shift(x, _word(bits)))


def _word(number):
    return ops.convert_to_tensor(number, "uint32")


def _drop(inputs, seed, dropped):
    """Dropout of `inputs` at the rate `dropped / LEVELS`."""
    noise = ops.reshape(hashed(math.prod(ops.shape(inputs)), seed), ops.shape(inputs))
    scaled = inputs * ops.cast(LEVELS / (LEVELS - dropped), inputs.dtype)
    return ops.where(noise >= _word(dropped), scaled, ops.zeros_like(inputs))


def _drop_on_tensorflow(inputs, seed, dropped):
    compiled = _compiled(dropped)
    return ops.custom_gradient(
        lambda x: (compiled(x, seed), lambda upstream: compiled(upstream, seed))
    )(inputs)


@functools.cache
def _compiled(dropped):
    import tensorflow as tf

    return tf.function(functools.partial(_drop, dropped=dropped), jit_compile=True)


APPLIERS = {"tensorflow": _drop_on_tensorflow, "jax": _drop}
