"""Muon for every weight matrix of a Vision Transformer, including those of attention."""

import math

import keras
from keras import ops


@keras.saving.register_keras_serializable("keras_vit")
class Muon(keras.optimizers.Muon):
    """`keras.optimizers.Muon` that treats attention's projection kernels as matrices.

    Muon (Jordan et al., 2024; scaled as by Liu et al., 2025, arXiv:2502.16982)
    replaces the momentum of a matrix by approximately the nearest orthogonal
    matrix, times `0.2 * sqrt(larger side)`, so that it takes AdamW's learning
    rates. Keras's own class leaves every variable that is not 2D to
    AdamW, including the projections of `MultiHeadAttention`.

    Here every variable named `kernel` with two or three dimensions is a
    matrix: `(D, A, D / A)` of queries, keys and values as `(D, D)`,
    `(A, D / A, D)` of attention's output likewise. Layers in `exclude_layers`,
    kernels of convolutions, biases, normalization, class token and position
    embedding are left to AdamW. Matrices of one shape share one batched iteration, in
    `iteration_dtype`.

    Args:
        learning_rate: float or `LearningRateSchedule`.
        weight_decay: float, decoupled weight decay of all variables, including
            those left to AdamW, except the ones passed to
            `exclude_from_weight_decay`.
        exclude_layers: list of strings, names of the layers whose kernels are
            left to AdamW.
        iteration_dtype: `"float32"` or `"bfloat16"`, dtype of the
            Newton-Schulz iteration; the latter is faster on devices that
            support it.
        **kwargs: arguments of `keras.optimizers.Muon`, except
            `exclude_embeddings`, which has no effect here.

    Raises:
        ValueError: if an argument is invalid, or if TensorFlow distributes the
            model over several replicas.

    Example:

    >>> loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    >>> model.compile(keras_vit.Muon(1e-3), loss=loss, metrics=["accuracy"])
    """

    def __init__(
        self,
        learning_rate=0.001,
        *,
        weight_decay: float = 0.05,
        exclude_layers=("patch_embedding", "head"),
        iteration_dtype: str = "float32",
        **kwargs,
    ):
        if isinstance(exclude_layers, str):
            raise ValueError(
                "Expected `exclude_layers` to be a list of layer names, such as ['head']. "
                f"Received: exclude_layers={exclude_layers!r}"
            )
        if iteration_dtype not in ("float32", "bfloat16"):
            raise ValueError(
                "Expected `iteration_dtype` to be 'float32' or 'bfloat16'. "
                f"Received: iteration_dtype={iteration_dtype!r}"
            )
        kwargs.setdefault("adam_weight_decay", weight_decay)
        super().__init__(
            learning_rate,
            weight_decay=weight_decay,
            exclude_layers=list(exclude_layers),
            **kwargs,
        )
        self.iteration_dtype = iteration_dtype

    def build(self, var_list):
        if keras.backend.backend() == "tensorflow":
            import tensorflow as tf

            replicas = tf.distribute.get_strategy().num_replicas_in_sync
            if replicas > 1:
                raise ValueError(
                    "Expected one replica: `keras_vit.Muon` does not sum gradients over the "
                    "replicas of `tf.distribute`. Use `keras.optimizers.Muon`, or JAX with "
                    f"`keras.distribution`. Received: num_replicas_in_sync={replicas}"
                )
        super().build(var_list)

    def _should_use_adamw(self, variable):
        *layers, name = variable.path.split("/")
        is_matrix = name == "kernel" and len(variable.shape) in (2, 3)
        return not is_matrix or not set(self.exclude_layers).isdisjoint(layers)

    def _backend_update_step(self, grads, trainable_variables, learning_rate):
        groups, others = {}, []
        for grad, variable in zip(grads, trainable_variables):
            if self._should_use_adamw(variable):
                others.append((grad, variable))
            else:
                groups.setdefault(_matrix_shape(variable), []).append((grad, variable))
        if others:
            super()._backend_update_step(*zip(*others), learning_rate)
        for shape, pairs in groups.items():
            self._update_matrices(shape, pairs, learning_rate)

    def _update_matrices(self, shape, pairs, learning_rate):
        """Updates all matrices of one shape."""
        averages = []
        for grad, variable in pairs:
            momentum = self.momentums[self._get_variable_index(variable)]
            grad = ops.cast(grad, variable.dtype)
            self.assign(momentum, momentum * self.momentum + grad)
            average = grad + self.momentum * momentum if self.nesterov else momentum
            averages.append(ops.reshape(ops.convert_to_tensor(average), shape))
        stack = ops.cast(ops.stack(averages), self.iteration_dtype)
        stack = self.zeropower_via_newtonschulz5(stack, self.ns_steps)
        scale = learning_rate
        if self.rms_rate is not None:
            scale = scale * self.rms_rate * math.sqrt(max(shape))
        updates = ops.unstack(scale * ops.cast(stack, "float32"), len(pairs))
        for (_, variable), update in zip(pairs, updates):
            self.assign_sub(variable, ops.reshape(update, variable.shape))

    def get_config(self):
        return {**super().get_config(), "iteration_dtype": self.iteration_dtype}


def _matrix_shape(variable):
    """Rows and columns of a kernel: `(inputs, outputs)` of the linear map that it is."""
    shape = tuple(variable.shape)
    # Of attention's output alone, the inputs have two dimensions.
    rows = len(shape) - 1 if "attention_output" in variable.path.split("/") else 1
    return math.prod(shape[:rows]), math.prod(shape[rows:])
