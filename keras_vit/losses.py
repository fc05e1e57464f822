"""Cross-entropy with label smoothing for integer labels, which Keras lacks."""

import keras
from keras import ops

from keras_vit.validation import fraction


@keras.saving.register_keras_serializable("keras_vit")
class LabelSmoothingCrossentropy(keras.losses.Loss):
    """Cross-entropy of logits and integer labels with label smoothing (Szegedy et al., 2016).

    `keras.losses.CategoricalCrossentropy` expects one-hot labels, and
    `keras.losses.SparseCategoricalCrossentropy` has no label smoothing. Labels
    have the shape `(B,)` or `(B, 1)`, logits `(B, num_classes)`.

    Args:
        label_smoothing: float in [0, 1], probability mass that is moved from
            the labelled class and spread evenly over all classes.
        **kwargs: base loss keyword arguments, such as `name`.

    Raises:
        ValueError: if `label_smoothing` is out of range, or if the labels are
            one-hot.

    Example:

    >>> loss = keras_vit.LabelSmoothingCrossentropy(0.1)
    >>> model.compile(optimizer="adamw", loss=loss, metrics=["accuracy"])
    """

    def __init__(self, label_smoothing: float = 0.1, **kwargs):
        super().__init__(**kwargs)
        self.label_smoothing = fraction("label_smoothing", label_smoothing)

    def call(self, labels, logits):
        if len(labels.shape) == len(logits.shape) and labels.shape[-1] == 1:
            labels = ops.squeeze(labels, axis=-1)
        if len(labels.shape) != len(logits.shape) - 1:
            raise ValueError(
                "Expected integer labels of shape (B,) or (B, 1) for logits (B, num_classes). For "
                "one-hot labels, use `keras.losses.CategoricalCrossentropy(from_logits=True, "
                f"label_smoothing={self.label_smoothing})`. Received: "
                f"labels.shape={tuple(labels.shape)}, logits.shape={tuple(logits.shape)}"
            )
        return keras.losses.categorical_crossentropy(
            ops.one_hot(ops.cast(labels, "int32"), logits.shape[-1], dtype=logits.dtype),
            logits,
            from_logits=True,
            label_smoothing=self.label_smoothing,
        )

    def get_config(self):
        return {**super().get_config(), "label_smoothing": self.label_smoothing}
