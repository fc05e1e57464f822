"""Keras's multi-head attention with fused projections."""

import keras
from keras import ops

from keras_vit.layers.dropout import Dropout


@keras.saving.register_keras_serializable("keras_vit")
class MultiHeadAttention(keras.layers.MultiHeadAttention):
    """`keras.layers.MultiHeadAttention` with the same weights, computed faster.

    Query, key and value of one sequence are computed by a single matrix product,
    and so is the output. Keras multiplies batches of matrices instead, whose
    gradient on TensorFlow is one matrix per image, summed afterwards.

    Everything else (masks, a separate key, several attention axes, gates,
    quantized or regularized projections, flash attention) falls back to Keras.

    Input and output shapes, arguments and errors are those of
    `keras.layers.MultiHeadAttention`.

    Example:

    >>> tokens = np.random.normal(size=(8, 65, 256))
    >>> keras_vit.layers.MultiHeadAttention(num_heads=8, key_dim=32)(tokens, tokens).shape
    (8, 65, 256)
    """

    def call(
        self,
        query,
        value,
        key=None,
        query_mask=None,
        value_mask=None,
        key_mask=None,
        attention_mask=None,
        return_attention_scores=False,
        training=None,
        use_causal_mask=False,
    ):
        masks = (query_mask, value_mask, key_mask, attention_mask)
        masked = use_causal_mask or any(mask is not None for mask in masks)
        if masked or key is not None or not self._is_plain(query, value):
            return super().call(
                query,
                value,
                key,
                *masks,
                return_attention_scores=return_attention_scores,
                training=training,
                use_causal_mask=use_causal_mask,
            )

        queried, keyed = (self._query_dense, self._inverse_sqrt_key_dim), (self._key_dense, 1)
        valued = (self._value_dense, 1)
        if query is value:
            query, key, value = self._project(value, [queried, keyed, valued])
        else:
            (query,) = self._project(query, [queried])
            key, value = self._project(value, [keyed, valued])
        scores = self._masked_softmax(ops.matmul(query, ops.swapaxes(key, 2, 3)))
        dropped = self._dropout_layer(scores, training=training)
        heads = ops.transpose(ops.matmul(dropped, value), (0, 2, 1, 3))

        tokens, width = heads.shape[1], self._num_heads * self._value_dim
        kernel = ops.reshape(self._output_dense.kernel, (width, -1))
        output = ops.matmul(ops.reshape(heads, (-1, width)), kernel)
        if self._use_bias:
            output = ops.add(output, self._output_dense.bias)
        output = ops.reshape(output, (-1, tokens, kernel.shape[-1]))
        return (output, scores) if return_attention_scores else output

    def _build_attention(self, rank):
        # Keras's own dropout layer would stay tracked, with an unused seed.
        rate, self._dropout = self._dropout, 0.0
        super()._build_attention(rank)
        self._dropout = rate
        self._dropout_layer = Dropout(rate, dtype=self.dtype_policy, seed=self.seed)

    def _is_plain(self, query, value):
        """Whether this is plain attention between tokens `(B, T, D)`."""
        shapes = query.shape, value.shape
        projections = self._query_dense, self._key_dense, self._value_dense, self._output_dense
        return (
            all(len(shape) == 3 and shape[1] is not None for shape in shapes)
            and self._key_dim == self._value_dim
            and self._attention_axes == (1,)
            and self._output_shape is None
            and self._sliding_window is None
            and self._activity_regularizer is None
            and not self._use_gate
            and not self._flash_attention
            and all(dense.quantization_mode is None for dense in projections)
        )

    def _project(self, tokens, projections):
        """Applies each projection, times its factor, to tokens `(B, T, D)`: `(B, A, T, D / A)`."""
        _, length, width = tokens.shape
        heads = self._num_heads, self._key_dim
        kernels = [ops.reshape(dense.kernel * by, (width, -1)) for dense, by in projections]
        output = ops.matmul(ops.reshape(tokens, (-1, width)), ops.concatenate(kernels, axis=1))
        if self._use_bias:
            biases = [ops.reshape(dense.bias * by, (-1,)) for dense, by in projections]
            output = ops.add(output, ops.concatenate(biases))
        output = ops.reshape(output, (-1, length, len(projections), *heads))
        return ops.unstack(ops.transpose(output, (2, 0, 3, 1, 4)), len(projections))
