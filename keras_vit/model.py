"""The Vision Transformer as one functional graph, from raw pixels to logits."""

import contextlib
import typing
from collections.abc import Sequence

import keras
import numpy as np

from keras_vit.arguments import positive_integer, shape_of_image, share_below_one
from keras_vit.execution import can_scan, scanned_train_function
from keras_vit.layers import (
    ClassToken,
    Dropout,
    LayerNormalization,
    MixUpCutMix,
    MultiHeadAttention,
    Patches,
    PositionEmbedding,
    RandomResizedCrop,
    gelu,
)
from keras_vit.layers.mix import partners

EPSILON = 1e-6


@keras.saving.register_keras_serializable("keras_vit")
class VisionTransformer(keras.Model):
    """Vision Transformer (Dosovitskiy et al., 2021) that carries its own preprocessing.

    Augmentation and normalization are the first layers of the model: it takes
    raw pixels, augments them while training only, and a saved model cannot be
    served with the wrong preprocessing.

    Input shape:
        4D tensor `(B, H, W, C)`, integers or floats from 0 to 255.

    Output shape:
        2D tensor `(B, num_classes)`, logits.

    Args:
        image_shape: tuple `(H, W, C)`, the shape of one image.
        num_classes: int, number of classes.
        patch_size: int, side `P` of a patch in pixels; divides `H` and `W`.
        embed_dim: int, width `D` of a token; a multiple of `num_heads`.
        mlp_dim: int, width of the hidden layer of a block's MLP.
        num_heads: int, attention heads `A` of a block.
        depth: int, number of blocks `L`.
        dropout: float in [0, 1), rate of every dropout, attention's included.
        stochastic_depth: float in [0, 1), how often training leaves out the
            last block's attention, and its MLP, for an image; blocks before
            it are left out less often, in proportion to their number (Huang
            et al., 2016).
        class_names: list of strings, one for each class, that travel with the
            model; none by default.
        augmentation: list of layers applied to the images of a training
            batch, in order. By default a horizontal flip and a
            `RandomResizedCrop` to the same size; `[]` for none. A
            `MixUpCutMix` among them mixes the labels in the loss as well.
        dtype: dtype policy of the layers, such as `"mixed_bfloat16"`; by
            default the global one. Pixels and logits stay in float32.
        **kwargs: base model keyword arguments, such as `name`.

    Raises:
        ValueError: if a size lies outside its range, if `num_heads` does not
            divide `embed_dim`, `patch_size` not the image, if there are more
            or fewer names than classes, or if several layers of the
            augmentation mix images.

    Example:

    >>> model = keras_vit.VisionTransformer()
    >>> model.adapt(train_images)
    >>> model.predict(test_images).shape
    (10000, 10)
    """

    def __init__(
        self,
        image_shape: tuple[int, int, int] = (32, 32, 3),
        num_classes: int = 10,
        patch_size: int = 4,
        embed_dim: int = 256,
        mlp_dim: int = 512,
        num_heads: int = 8,
        depth: int = 6,
        dropout: float = 0.2,
        stochastic_depth: float = 0.0,
        class_names: Sequence[str] | None = None,
        augmentation: Sequence[keras.layers.Layer] | None = None,
        dtype: str | keras.DTypePolicy | None = None,
        **kwargs,
    ):
        sizes = {
            "num_classes": num_classes,
            "patch_size": patch_size,
            "embed_dim": embed_dim,
            "mlp_dim": mlp_dim,
            "num_heads": num_heads,
            "depth": depth,
        }
        sizes = {name: positive_integer(name, size) for name, size in sizes.items()}
        image_shape = shape_of_image(image_shape)
        dropout = share_below_one("dropout", dropout)
        stochastic_depth = share_below_one("stochastic_depth", stochastic_depth)
        if embed_dim % num_heads:
            raise ValueError(
                "Expected `embed_dim` to be a multiple of `num_heads`. "
                f"Received: embed_dim={embed_dim}, num_heads={num_heads}"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"Expected `class_names` to be {num_classes} names. "
                f"Received: class_names={class_names!r}"
            )
        if augmentation is None:
            augmentation = default_augmentation(image_shape)
        mixing = [layer for layer in augmentation if isinstance(layer, MixUpCutMix)]
        if len(mixing) > 1:
            raise ValueError(
                "Expected one layer of `augmentation` to mix images at most. "
                f"Received: augmentation={list(augmentation)}"
            )

        policy = keras.dtype_policies.get(dtype)
        with _default_policy(policy):
            images = x = keras.Input(image_shape, name="images")
            for layer in augmentation:
                x = layer(x)
            # Pixels stay in float32 under mixed precision: bfloat16 would round them.
            x = keras.layers.Normalization(dtype="float32", name="normalization")(x)
            x = Patches(patch_size, name="patches")(x)
            x = dense(embed_dim, name="patch_embedding")(x)
            x = ClassToken(name="class_token")(x)
            x = PositionEmbedding(name="position_embedding")(x)
            x = Dropout(dropout, name="dropout")(x)
            for block in range(1, depth + 1):
                # The head reads the class token alone: the last block leaves out the others.
                tokens = 1 if block == depth else None
                name = f"block_{block}"
                skipping = stochastic_depth * block / depth
                x = transformer_block(x, mlp_dim, num_heads, dropout, name, tokens, skipping)
            x = LayerNormalization(epsilon=EPSILON, name="norm")(x)
            logits = dense(num_classes, dtype="float32", name="head")(x[:, 0])

        super().__init__(inputs=images, outputs=logits, **kwargs)
        self.augmentation = list(augmentation)
        self._mixing = mixing
        names = None if class_names is None else tuple(map(str, class_names))
        self.class_names = names
        # Short digests of the image files that it was trained or validated on, if there are any.
        self.seen = ()
        self._config = {
            "image_shape": image_shape,
            "dropout": dropout,
            "stochastic_depth": stochastic_depth,
            "class_names": names and list(names),
            "dtype": policy.name,
            **sizes,
        }

    def adapt(self, images: np.ndarray) -> None:
        """Learns mean and variance of each channel; call it before `fit`, with training images.

        Args:
            images: array `(B, H, W, C)` of raw pixels.
        """
        # Of all images at once, Keras would make a copy eight times as large as they are.
        groups = (images[start : start + 1024] for start in range(0, len(images), 1024))
        self.get_layer("normalization").adapt(groups)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Keras's loss of a batch; where training mixed its images, the loss mixes their labels."""
        loss = super().compute_loss(x, y, y_pred, sample_weight, training)
        if not (training and self._mixing):
            return loss
        y = keras.tree.map_structure(partners, y)
        sample_weight = None if sample_weight is None else partners(sample_weight)
        kept = self._mixing[0].kept
        return kept * loss + (1 - kept) * super().compute_loss(
            x, y, y_pred, sample_weight, training
        )

    def make_train_function(self, force=False):
        """Keras's function of a training step; called by `fit`."""
        is_new = force or self.train_function is None
        super().make_train_function(force)
        if is_new and can_scan(self):
            self.train_function = scanned_train_function(self)

    def get_config(self):
        layers = [keras.saving.serialize_keras_object(layer) for layer in self.augmentation]
        frozen = [layer.name for layer in self.layers if not layer.trainable]
        return {
            **self._config,
            "augmentation": layers,
            "name": self.name,
            "frozen": frozen,
            "seen": list(self.seen),
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layers = [
            keras.saving.deserialize_keras_object(layer, custom_objects=custom_objects)
            for layer in config["augmentation"]
        ]
        settings = {**config, "augmentation": layers}
        frozen, seen = settings.pop("frozen", []), settings.pop("seen", ())
        model = cls(**settings)
        model.seen = tuple(seen)
        for name in frozen:
            model.get_layer(name).trainable = False
        return model


@contextlib.contextmanager
def _default_policy(policy):
    """Makes a dtype policy that of every layer made inside."""
    previous = keras.config.dtype_policy()
    keras.config.set_dtype_policy(policy)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(previous)


def default_augmentation(image_shape, horizontal_flip=True):
    """The layers that vary training images: a flip with probability 0.5, then a crop.

    Args:
        image_shape: tuple `(H, W, C)`.
        horizontal_flip: bool; digits and letters must not be mirrored.
    """
    height, width, _ = image_shape
    like_pixels: dict[str, typing.Any] = {"data_format": "channels_last", "dtype": "float32"}
    flip = keras.layers.RandomFlip("horizontal", name="random_flip", **like_pixels)
    crop = RandomResizedCrop(height, width, name="random_resized_crop", **like_pixels)
    return [flip, crop] if horizontal_flip else [crop]


def transformer_block(x, mlp_dim, num_heads, dropout, name, tokens=None, skipping=0.0):
    """One pre-norm block: `x + MHA(LN(x))`, then `x + MLP(LN(x))`.

    Args:
        x: tokens `(B, T, D)`.
        mlp_dim: int, width of the MLP's hidden layer.
        num_heads: int, attention heads.
        dropout: float, rate of every dropout.
        name: string that starts the names of the block's layers.
        tokens: int, how many tokens, from the first, the block computes; all by default. Each of
            them attends to all `T` nevertheless.
        skipping: float, how often training adds nothing to the tokens of an image, decided for
            attention and MLP each.

    Returns:
        Tokens `(B, T, D)`, or `(B, tokens, D)`.
    """
    width = x.shape[-1]
    normed = LayerNormalization(epsilon=EPSILON, name=f"{name}_attention_norm")(x)
    queries = normed
    if tokens is not None:
        x, queries = x[:, :tokens], normed[:, :tokens]
    attended = MultiHeadAttention(
        num_heads,
        width // num_heads,
        dropout=dropout,
        kernel_initializer=kernel_initializer(),
        name=f"{name}_attention",
    )(queries, normed)
    attended = _skipped_at_random(attended, skipping, f"{name}_attention_skip")
    x = keras.layers.Add(name=f"{name}_attention_sum")([x, attended])

    y = LayerNormalization(epsilon=EPSILON, name=f"{name}_mlp_norm")(x)
    y = dense(mlp_dim, activation=gelu, name=f"{name}_mlp_hidden")(y)
    y = Dropout(dropout, name=f"{name}_mlp_hidden_dropout")(y)
    y = dense(width, name=f"{name}_mlp_output")(y)
    y = Dropout(dropout, name=f"{name}_mlp_output_dropout")(y)
    y = _skipped_at_random(y, skipping, f"{name}_mlp_skip")
    return keras.layers.Add(name=f"{name}_mlp_sum")([x, y])


def _skipped_at_random(x, rate, name):
    """Tokens `(B, T, D)`, in training all zero for a share of the images."""
    if not rate:
        return x
    return keras.layers.Dropout(rate, noise_shape=(None, 1, 1), name=name)(x)


def dense(units, **kwargs):
    """A Dense layer whose kernel starts like every kernel of the model."""
    return keras.layers.Dense(units, kernel_initializer=kernel_initializer(), **kwargs)


def kernel_initializer():
    """Uniform noise of variance `1 / (3 * inputs)`, PyTorch's habit for linear layers.

    Keras's own Glorot noise is up to twice as large and learns more slowly here.
    """
    return keras.initializers.VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")
