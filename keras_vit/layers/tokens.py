"""What a transformer adds to a sequence of tokens, a class token and positions, and reads of it."""

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_vit")
class ClassToken(keras.layers.Layer):
    """Puts a learned token in front of every sequence.

    After the last block, the head reads this token only (BERT's `[CLS]`, adopted
    by Dosovitskiy et al., 2021).

    Input shape:
        3D tensor `(B, N, D)`.

    Output shape:
        3D tensor `(B, N + 1, D)`, the class token at position zero.

    Args:
        initializer: initializer of the token; by default normal with standard
            deviation 0.2.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.
    """

    def __init__(self, initializer=None, **kwargs):
        super().__init__(**kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.initializer = _token_initializer(initializer)

    def build(self, input_shape):
        self.token = self.add_weight(
            name="token", shape=(1, 1, input_shape[-1]), initializer=self.initializer
        )

    def call(self, tokens):
        batch_size, _, width = ops.shape(tokens)
        class_token = ops.broadcast_to(self.token, (batch_size, 1, width))
        return ops.concatenate([ops.cast(class_token, tokens.dtype), tokens], axis=1)

    def compute_output_shape(self, input_shape):
        batch_size, length, width = input_shape
        return (batch_size, None if length is None else length + 1, width)

    def get_config(self):
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
        }


@keras.saving.register_keras_serializable("keras_vit")
class FirstToken(keras.layers.Layer):
    """The first token of every sequence, such as the class token, which a head reads.

    Input shape:
        3D tensor `(B, T, D)`.

    Output shape:
        2D tensor `(B, D)`.
    """

    def call(self, tokens):
        return tokens[:, 0]

    def compute_output_shape(self, input_shape):
        return (input_shape[0], input_shape[2])

    def get_config(self):
        return super().get_config()  # Keras's own knows only layers without dtype policies.


@keras.saving.register_keras_serializable("keras_vit")
class PositionEmbedding(keras.layers.Layer):
    """Adds a learned vector to the token at each position.

    Attention treats tokens as a set; these vectors encode the position of each
    token.

    Input shape:
        3D tensor `(B, T, D)` with known `T`.

    Output shape:
        3D tensor `(B, T, D)`.

    Args:
        initializer: initializer of the vectors; by default normal with standard
            deviation 0.2.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.
    """

    def __init__(self, initializer=None, **kwargs):
        super().__init__(**kwargs)
        self.input_spec = keras.layers.InputSpec(ndim=3)
        self.initializer = _token_initializer(initializer)

    def build(self, input_shape):
        _, length, width = input_shape
        self.position = self.add_weight(
            name="position", shape=(1, length, width), initializer=self.initializer
        )

    def call(self, tokens):
        return tokens + ops.cast(self.position, tokens.dtype)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        return {
            **super().get_config(),
            "initializer": keras.initializers.serialize(self.initializer),
        }


def _token_initializer(identifier):
    """A new initializer, so that no two layers draw the same numbers."""
    if identifier is None:
        # With the usual 0.02, positions are too small beside the patch embeddings to matter in
        # most of the first epoch.
        return keras.initializers.RandomNormal(stddev=0.2)
    return keras.initializers.get(identifier)
