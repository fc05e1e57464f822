"""MixUp and CutMix inside the model: the images here, their labels in the loss."""

import keras
from keras import ops

from keras_vit.arguments import share


@keras.saving.register_keras_serializable("keras_vit")
class MixUpCutMix(keras.layers.Layer):
    """Blends training images in pairs, or pastes a box of one into another.

    Every image is paired with the one at the same place from the end of the
    batch. MixUp (Zhang et al., 2018) blends the pair; CutMix (Yun et al.,
    2019) cuts one box out of all second images and pastes it into the first.
    What part of an image stays is uniform between 0 and 1 (the papers'
    `alpha=1`) and the same for the whole batch.

    The labels are mixed where they count: with this layer in its
    `augmentation`, a `VisionTransformer` weighs its training loss for the
    labels of an image and for those of its partner by `kept`. So labels may be
    integers, any loss will do, and training accuracy counts the label of the
    first image alone. Keras's own `MixUp` and `CutMix` take images and labels
    in a dictionary and cannot be part of a model.

    With `training=False` images pass unchanged.

    Input shape:
        4D tensor `(B, H, W, C)`, of any range.

    Output shape:
        The same, in the dtype that the layer computes in.

    Args:
        mixup: float in [0, 1], share of the batches that MixUp blends.
        cutmix: float in [0, 1 - mixup], share of the batches that CutMix
            pastes into.
        seed: int, makes the draws reproducible.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.

    Attributes:
        kept: variable, what share of each image stayed in the last training
            batch.

    Raises:
        ValueError: if the shares lie outside the ranges above.

    Example:

    >>> mix = keras_vit.MixUpCutMix(mixup=0.5, cutmix=0.5)
    >>> model = keras_vit.VisionTransformer(augmentation=[mix])
    """

    def __init__(self, mixup: float = 0.5, cutmix: float = 0.5, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if share("mixup", mixup) + share("cutmix", cutmix) > 1:
            raise ValueError(
                "Expected `mixup` and `cutmix` to be shares of the batches, 1 at most together. "
                f"Received: mixup={mixup}, cutmix={cutmix}"
            )
        self.input_spec = keras.layers.InputSpec(ndim=4)
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed
        self.generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self.kept = self.add_weight(
            name="kept", shape=(), initializer="ones", trainable=False, dtype="float32"
        )

    def call(self, images, training=False):
        images = ops.cast(images, self.compute_dtype)
        if not training:
            return images
        height, width = images.shape[1:3]
        kind, kept, y, x = ops.unstack(keras.random.uniform((4,), seed=self.generator))
        blends, pastes = kind < self.mixup, kind >= 1 - self.cutmix
        rows = _inside(height, y, ops.sqrt(1 - kept))
        columns = _inside(width, x, ops.sqrt(1 - kept))
        box = ops.cast(rows[:, None] & columns[None, :], "float32")

        # What comes from the partner, for each pixel and on average.
        foreign = ops.where(blends, 1 - kept, ops.where(pastes, box, 0.0))
        self.kept.assign(1 - ops.mean(foreign))
        foreign = ops.cast(foreign, images.dtype)[:, :, None]
        return images + foreign * (partners(images) - images)

    def compute_output_shape(self, input_shape):
        return input_shape

    def get_config(self):
        config = {"mixup": self.mixup, "cutmix": self.cutmix, "seed": self.seed}
        return {**super().get_config(), **config}


def partners(batch):
    """For each entry of a batch `(B, ...)`, the one that it is mixed with."""
    return ops.flip(batch, axis=0)


def _inside(length, center, extent):
    """Which of `length` pixels lie in a span around `center`; both are shares of the length."""
    distance = ops.abs((ops.arange(length, dtype="float32") + 0.5) / length - center)
    return distance < extent / 2
