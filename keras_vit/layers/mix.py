"""MixUp and CutMix inside the model: `VisionTransformer.compute_loss` mixes the labels."""

import keras
from keras import ops

from keras_vit.layers.pipelines import PipelineLayer
from keras_vit.validation import fraction


@keras.saving.register_keras_serializable("keras_vit")
class MixUpCutMix(PipelineLayer):
    """Blends training images in pairs, or pastes a box of one into another.

    Every image is paired with the one at the same position from the end of the
    batch. MixUp (Zhang et al., 2018) blends the pair; CutMix (Yun et al.,
    2019) pastes a box of the second image into the first. The fraction of an
    image that is kept is uniform between 0 and 1 (the papers' `alpha=1`), for
    CutMix before its box is cut off at the border, and the same for the whole
    batch.

    The labels are mixed in the loss: with this layer in its `augmentation`, a
    `VisionTransformer` weights the training loss for the label of an image and
    for that of its partner by `kept`. Labels may be integers, any loss works,
    and training accuracy refers to the label of the first image. In another
    model, nothing mixes the labels: give the layer a dictionary there.

    Given a dictionary of images and one-hot labels, like Keras's own `MixUp`
    and `CutMix`, the layer mixes both. Use it this way inside a `tf.data`
    pipeline, on any backend: a loss cannot know what was mixed there.

    Without `training=True`, images and labels pass unchanged.

    Input shape:
        4D tensor `(B, H, W, C)`, of any range. Or a dictionary of such
        `"images"` and of `"labels"` `(B, num_classes)`, probabilities.

    Output shape:
        The same, images in the dtype that the layer computes in (integers are
        rounded), labels in float32.

    Args:
        mixup: float in [0, 1], probability of applying MixUp to a batch.
        cutmix: float in [0, 1 - mixup], probability of applying CutMix to a
            batch.
        seed: int, makes the draws reproducible.
        **kwargs: base layer keyword arguments, such as `name` and `dtype`.

    Attributes:
        kept: variable, fraction of each image that was kept in the last
            training batch of images without labels.

    Raises:
        ValueError: if the probabilities are out of range, if the images do not
            have four dimensions, if the labels are not one-hot, or, on JAX and
            PyTorch, if labels are missing inside a `tf.data` pipeline.

    Example:

    >>> mix = keras_vit.MixUpCutMix(mixup=0.5, cutmix=0.5)
    >>> model = keras_vit.VisionTransformer(augmentation=[mix])

    >>> data = {"images": images, "labels": keras.ops.one_hot(labels, 10)}
    >>> data = mix(data, training=True)
    """

    def __init__(self, mixup: float = 0.5, cutmix: float = 0.5, seed: int | None = None, **kwargs):
        super().__init__(**kwargs)
        if fraction("mixup", mixup) + fraction("cutmix", cutmix) > 1:
            raise ValueError(
                "Expected `mixup` and `cutmix` to be probabilities whose sum is at most 1. "
                f"Received: mixup={mixup}, cutmix={cutmix}"
            )
        self.mixup, self.cutmix, self.seed = mixup, cutmix, seed
        self.generator = keras.random.SeedGenerator(seed)

    def build(self, input_shape):
        self.kept = self.add_weight(
            name="kept", shape=(), initializer="ones", trainable=False, dtype="float32"
        )

    def call(self, data, training=False):
        self._check(data, training)
        has_labels = isinstance(data, dict)
        images = self.backend.convert_to_tensor(data["images"] if has_labels else data)
        labels = self.backend.cast(data["labels"], "float32") if has_labels else None
        if training:
            partner_weight = self._draw(images)
            partner_fraction = self.backend.numpy.mean(partner_weight)
            images = self._mix(images, partner_weight[:, :, None])
            if has_labels:
                labels = self._mix(labels, partner_fraction)
            else:
                self.kept.assign(1 - partner_fraction)
        images = self._to_compute_dtype(images)
        return {"images": images, "labels": labels} if has_labels else images

    def compute_output_shape(self, input_shape):
        return input_shape

    def compute_output_spec(self, data, training=False):
        self._check(data, training)
        specs = super().compute_output_spec(data)
        if isinstance(data, dict):
            specs["labels"] = keras.KerasTensor(data["labels"].shape, "float32")
        return specs

    def get_config(self):
        config = {"mixup": self.mixup, "cutmix": self.cutmix, "seed": self.seed}
        return {**super().get_config(), **config}

    def _draw(self, images):
        """Weight of the partner in each pixel, `(H, W)`, the same for the whole batch."""
        np = self.backend.numpy
        _, height, width, _ = self.backend.shape(images)
        seed = self._get_seed_generator(self.backend.name)
        draws = self.backend.random.uniform((4,), dtype="float32", seed=seed)
        kind, kept, y, x = (draws[index] for index in range(4))
        extent = np.sqrt(1 - kept)
        rows, columns = self._inside(height, y, extent), self._inside(width, x, extent)
        box = self.backend.cast(rows[:, None] & columns[None, :], "float32")
        blends, pastes = kind < self.mixup, kind >= 1 - self.cutmix
        return np.where(blends, 1 - kept, np.where(pastes, box, 0.0))

    def _inside(self, length, center, extent):
        """Which pixels lie in a span; `center` and `extent` are fractions of `length`."""
        np = self.backend.numpy
        places = np.arange(length, dtype="float32") + 0.5
        distance = np.abs(places / self.backend.cast(length, "float32") - center)
        return distance < extent / 2

    def _mix(self, batch, partner_weight):
        batch = self.backend.cast(batch, "float32")
        return batch + partner_weight * (partners(batch, self.backend.numpy) - batch)

    def _check(self, data, training):
        """Raises a `ValueError` for data that the layer cannot mix."""
        if isinstance(data, dict):
            shapes = {name: tuple(x.shape) for name, x in data.items()}
            if {name: len(shape) for name, shape in shapes.items()} != {"images": 4, "labels": 2}:
                raise ValueError(
                    "Expected a dictionary of 'images' (B, H, W, C) and one-hot 'labels' "
                    "(B, num_classes), which `keras.ops.one_hot(labels, num_classes)` makes. "
                    f"Received: shapes={shapes}"
                )
            return
        if len(data.shape) != 4:
            raise ValueError(
                "Expected a batch of images (B, H, W, C). "
                f"Received: images.shape={tuple(data.shape)}"
            )
        if training and self.backend.name != keras.backend.backend():
            raise ValueError(
                "Expected a dictionary of 'images' and one-hot 'labels': inside `tf.data`, no "
                f"loss can mix the labels. Received: images.shape={tuple(data.shape)}"
            )


def partners(batch, np=ops):
    """For each example of a batch `(B, ...)`, the one that it is mixed with.

    `np` is a module of Keras operations, by default the backend's; `tf.data` needs TensorFlow's.
    """
    return np.flip(batch, axis=0)
