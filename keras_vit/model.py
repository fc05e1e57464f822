"""The Vision Transformer as one functional graph, from raw pixels to logits."""

import math
import typing
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_vit.jax_multi_step import can_scan, scanned_train_function
from keras_vit.layers import (
    ClassToken,
    Dropout,
    LayerNormalization,
    MixUpCutMix,
    MultiHeadAttention,
    Normalization,
    Patches,
    PositionEmbedding,
    RandomResizedCrop,
    gelu,
)
from keras_vit.layers.mix import partners
from keras_vit.validation import positive_integer, shape_of_image, share_below_one

EPSILON = 1e-6


@keras.saving.register_keras_serializable("keras_vit")
class VisionTransformer(keras.Model):
    """Vision Transformer (Dosovitskiy et al., 2021) that carries its own preprocessing.

    Augmentation and normalization are the first layers of the model: it takes
    raw pixels, augments them in `fit` and with `training=True` only, and a
    saved model cannot be served with the wrong preprocessing.

    Input shape:
        4D tensor `(B, H, W, C)`, integers or floats from 0 to 255.

    Output shape:
        2D tensor `(B, num_classes)`, logits.

    Args:
        image_shape: tuple `(H, W, C)`, the shape of one image.
        num_classes: int, number of classes.
        patch_size: int, side `P` of a patch in pixels; divides `H` and `W`, as
            they are behind `augmentation`.
        embed_dim: int, width `D` of a token; a multiple of `num_heads`.
        mlp_dim: int, width of the hidden layer of a block's MLP.
        num_heads: int, attention heads `A` of a block.
        depth: int, number of blocks `L`.
        dropout: float in [0, 1), rate of every dropout, attention's included.
        stochastic_depth: float in [0, 1), how often training leaves out the
            last block's attention, and its MLP, for an image; blocks before
            it are left out less often, in proportion to their number (Huang
            et al., 2016).
        pooling: string, what the head reads: `"token"`, a class token that
            stands in front of the patches, or `"mean"`, the mean of all
            patches' tokens; there is no class token then.
        class_names: list of strings, one for each class, that travel with the
            model; none by default.
        augmentation: list of layers between the images and their
            normalization, in order. By default a horizontal flip and a
            `RandomResizedCrop` to the same size; `[]` for none. Random layers
            of Keras act in training alone; others, such as `Resizing`,
            always. A `MixUpCutMix` among them mixes the labels in the loss as
            well.
        dtype: dtype policy of the layers, such as `"mixed_bfloat16"`; by
            default the global one. Pixels and logits stay in float32.
        **kwargs: base model keyword arguments, such as `name`.

    Raises:
        ValueError: if an argument lies outside its range, if `num_heads` does not
            divide `embed_dim`, `patch_size` not the image, if there are more
            or fewer names than classes, or if `augmentation` contains something
            that is not a layer, returns no images or mixes them without their labels.

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
        pooling: str = "token",
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
        if pooling not in ("token", "mean"):
            raise ValueError(
                f"Expected `pooling` to be 'token' or 'mean'. Received: pooling={pooling!r}"
            )
        if class_names is not None and len(class_names) != num_classes:
            raise ValueError(
                f"Expected `class_names` to be {num_classes} names. "
                f"Received: class_names={class_names!r}"
            )
        if augmentation is None:
            augmentation = default_augmentation(image_shape)
        augmentation = _checked(augmentation)
        mixing = [
            inner
            for layer in augmentation
            for inner in layer._flatten_layers()
            if isinstance(inner, MixUpCutMix)
        ]
        if len(mixing) > 1:
            raise ValueError(
                "Expected one layer of `augmentation` to mix images at most. "
                f"Received: augmentation={augmentation}"
            )

        policy = keras.dtype_policies.get(dtype)
        images = keras.Input(image_shape, name="images", dtype="float32")
        x = _augmented(images, augmentation)
        # Pixels stay in float32 under mixed precision: bfloat16 would round them.
        x = Normalization(dtype="float32", name="normalization")(x)
        x = Patches(patch_size, dtype=policy, name="patches")(x)
        x = dense(embed_dim, dtype=policy, name="patch_embedding")(x)
        if pooling == "token":
            x = ClassToken(dtype=policy, name="class_token")(x)
        x = PositionEmbedding(dtype=policy, name="position_embedding")(x)
        x = Dropout(dropout, dtype=policy, name="dropout")(x)
        for block in range(1, depth + 1):
            # The head reads the class token alone: the last block leaves out the others.
            tokens = 1 if block == depth and pooling == "token" else None
            name = f"block_{block}"
            skipping = stochastic_depth * block / depth
            x = transformer_block(x, mlp_dim, num_heads, dropout, name, tokens, skipping, policy)
        x = LayerNormalization(epsilon=EPSILON, dtype=policy, name="norm")(x)
        if pooling == "token":
            x = x[:, 0]
        else:
            x = keras.layers.GlobalAveragePooling1D(dtype="float32", name="mean_of_patches")(x)
        logits = dense(num_classes, dtype="float32", name="head")(x)

        super().__init__(inputs=images, outputs=logits, **kwargs)
        self.augmentation = augmentation
        self._mixing = mixing
        names = None if class_names is None else tuple(map(str, class_names))
        self.class_names = names
        self.pooling = pooling
        # Short digests of the image files that it was trained or validated on, if there are any.
        self.seen = ()
        self._config = {
            "image_shape": image_shape,
            "dropout": dropout,
            "stochastic_depth": stochastic_depth,
            "pooling": pooling,
            "class_names": names and list(names),
            "dtype": policy.name,
            **sizes,
        }

    def adapt(self, images: np.ndarray) -> None:
        """Learns mean and variance of each channel; call it before `fit`, with training images.

        They are those of the images as they reach the normalization: behind the layers of
        `augmentation`, which act as in inference. A channel that does not vary is centred and not
        scaled, with a warning.

        Args:
            images: array `(B, H, W, C)` of raw pixels.

        Raises:
            ValueError: if there is no image, or if images have another shape
                than the model takes.
        """
        if tuple(images.shape[1:]) != self.input_shape[1:] or not len(images):
            expected = ", ".join(map(str, self.input_shape[1:]))
            raise ValueError(
                f"Expected `images` of shape (B, {expected}) with at least one of them. "
                f"Received: images.shape={tuple(images.shape)}"
            )
        normalization = self.get_layer("normalization")
        before = keras.Model(self.input, normalization.input)
        # A few megabytes at a time: all of them as floats would fill the memory.
        most = max(math.prod(shape[1:]) for shape in (before.input_shape, before.output_shape))
        size = max(1, 2**22 // most)
        groups = (images[start : start + size] for start in range(0, len(images), size))
        normalization.adapt(ops.convert_to_numpy(before(x, training=False)) for x in groups)

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
        inside = list(_inside(self))
        return {
            **self._config,
            "augmentation": layers,
            "name": self.name,
            "seen": list(self.seen),
            "trainable_layers": {
                path: layer.trainable
                for path, layer, parent in inside
                if layer.trainable != parent.trainable
            },
            "quantized_layers": {
                path: _quantization(layer)
                for path, layer, _ in inside
                if layer.quantization_mode is not None
            },
        }

    @classmethod
    def from_config(cls, config, custom_objects=None):
        layers = [
            layer
            if isinstance(layer, keras.layers.Layer)
            else keras.saving.deserialize_keras_object(layer, custom_objects=custom_objects)
            for layer in config["augmentation"]
        ]
        settings = {**config, "augmentation": layers}
        # Files of earlier versions list the frozen layers of the graph.
        trainable = dict.fromkeys(settings.pop("frozen", ()), False)
        trainable |= settings.pop("trainable_layers", {})
        quantized = settings.pop("quantized_layers", {})
        seen = settings.pop("seen", ())
        model = cls(**settings)
        model.seen = tuple(seen)
        for path, layer, _ in _inside(model):
            if path in quantized and layer.quantization_mode is None:
                how = keras.saving.deserialize_keras_object(quantized[path]["config"])
                layer.quantize(quantized[path]["mode"], config=how)
            if path in trainable:
                layer.trainable = trainable[path]
        return model


def _inside(layer, path=""):
    """Path, layer and parent of all layers inside of one, each before those that it has inside."""
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        yield path + inner.name, inner, layer
        yield from _inside(inner, f"{path}{inner.name}/")


def _quantization(layer):
    """How a layer is quantized, for a file."""
    config = getattr(layer, "quantization_config", None)
    return {
        "mode": layer.quantization_mode,
        "config": keras.saving.serialize_keras_object(config),
    }


def _checked(augmentation):
    """A list of layers, all of which can vary images inside of a model."""
    if not isinstance(augmentation, Sequence) or not all(
        isinstance(layer, keras.layers.Layer) for layer in augmentation
    ):
        raise ValueError(
            "Expected `augmentation` to be a list of Keras layers. "
            f"Received: augmentation={augmentation!r}"
        )
    # Keras may have given the names of ours to layers of its own.
    names = ["normalization", "dropout", *(layer.name for layer in augmentation)]
    for layer in augmentation:
        if names.count(layer.name) > 1:
            raise ValueError(
                "Expected each layer of `augmentation` once, under a name that no other layer of "
                f"the model has. Received: {layer.name!r} twice. Pass `name` to this "
                f"{type(layer).__name__}."
            )
        for inner in layer._flatten_layers():
            if isinstance(inner, (keras.layers.MixUp, keras.layers.CutMix)):
                raise ValueError(
                    "Expected layers in `augmentation` that leave the labels right. Received: "
                    f"{inner.name!r}, a {type(inner).__name__} of Keras's, which mixes images "
                    "alone. `keras_vit.MixUpCutMix` mixes their labels in the loss, too."
                )
    return list(augmentation)


def _augmented(images, augmentation):
    """Symbolic images `(B, H, W, C)` behind the layers of an augmentation."""
    for layer in augmentation:
        # Left to themselves, Keras's image layers act as in training. What the model is called
        # with, as by `fit`, overrules what is said here.
        images = layer(images, training=False)
        shape = getattr(images, "shape", None)
        if shape is None or len(shape) != 4 or None in shape[1:]:
            raise ValueError(
                "Expected the layers of `augmentation` to return images of shape (batch, height, "
                "width, channels) with a known height, width and number of channels. Received: "
                f"shape={shape} from {layer.name!r}, a {type(layer).__name__}"
            )
    return images


def default_augmentation(image_shape, horizontal_flip=True, **crop):
    """The layers that vary training images: a flip with probability 0.5, then a crop.

    Args:
        image_shape: tuple `(H, W, C)`.
        horizontal_flip: bool; digits and letters must not be mirrored.
        **crop: arguments of `RandomResizedCrop`, such as `scale`.
    """
    height, width, _ = image_shape
    like_pixels: dict[str, typing.Any] = {"data_format": "channels_last", "dtype": "float32"}
    flip = keras.layers.RandomFlip("horizontal", name="random_flip", **like_pixels)
    crop = RandomResizedCrop(height, width, name="random_resized_crop", **like_pixels, **crop)
    return [flip, crop] if horizontal_flip else [crop]


def augmented_for_display(layers, images, training=False):
    """Images behind the layers of an augmentation, for people to look at.

    What layers such as `Rescaling` do to the range of pixels is undone, channel by channel: what
    they make of a black and of a white image is 0 and 255 again.

    Args:
        layers: list of layers.
        images: array `(B, H, W, C)`, 0 to 255.
        training: bool, whether random layers act.

    Returns:
        Array of float32, in the size in which images leave the layers.
    """

    def behind(images, training=False):
        for layer in layers:
            images = layer(images, training=training)
        return ops.convert_to_numpy(images).astype("float32")

    # What a layer draws to be looked at must not change what training draws.
    state = [(variable, variable.numpy()) for layer in layers for variable in layer.variables]

    images = np.asarray(images, "float32")
    result = behind(images, training)
    for variable, value in state:
        variable.assign(value)
    black, white = (
        behind(np.full_like(images[:1], value)).mean(axis=(0, 1, 2)) for value in (0, 255)
    )
    same = np.isclose(black, white)
    black = np.where(same, result.min(axis=(0, 1, 2)), black)
    white = np.where(same, result.max(axis=(0, 1, 2)), white)
    return 255 * (result - black) / np.where(white == black, 1, white - black)


def transformer_block(x, mlp_dim, num_heads, dropout, name, tokens=None, skipping=0.0, dtype=None):
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
        dtype: dtype policy of the layers.

    Returns:
        Tokens `(B, T, D)`, or `(B, tokens, D)`.
    """
    width = x.shape[-1]
    normed = LayerNormalization(epsilon=EPSILON, dtype=dtype, name=f"{name}_attention_norm")(x)
    queries = normed
    if tokens is not None:
        x, queries = x[:, :tokens], normed[:, :tokens]
    attended = MultiHeadAttention(
        num_heads,
        width // num_heads,
        dropout=dropout,
        kernel_initializer=kernel_initializer(),
        dtype=dtype,
        name=f"{name}_attention",
    )(queries, normed)
    attended = _skipped_at_random(attended, skipping, dtype, f"{name}_attention_skip")
    x = keras.layers.Add(dtype=dtype, name=f"{name}_attention_sum")([x, attended])

    y = LayerNormalization(epsilon=EPSILON, dtype=dtype, name=f"{name}_mlp_norm")(x)
    y = dense(mlp_dim, activation=gelu, dtype=dtype, name=f"{name}_mlp_hidden")(y)
    y = Dropout(dropout, dtype=dtype, name=f"{name}_mlp_hidden_dropout")(y)
    y = dense(width, dtype=dtype, name=f"{name}_mlp_output")(y)
    y = Dropout(dropout, dtype=dtype, name=f"{name}_mlp_output_dropout")(y)
    y = _skipped_at_random(y, skipping, dtype, f"{name}_mlp_skip")
    return keras.layers.Add(dtype=dtype, name=f"{name}_mlp_sum")([x, y])


def _skipped_at_random(x, rate, dtype, name):
    """Tokens `(B, T, D)`, in training all zero for a share of the images."""
    if not rate:
        return x
    return keras.layers.Dropout(rate, noise_shape=(None, 1, 1), dtype=dtype, name=name)(x)


def dense(units, **kwargs):
    """A Dense layer whose kernel starts like every kernel of the model."""
    return keras.layers.Dense(units, kernel_initializer=kernel_initializer(), **kwargs)


def kernel_initializer():
    """Uniform noise of variance `1 / (3 * inputs)`, PyTorch's habit for linear layers.

    Keras's own Glorot noise is up to twice as large and learns more slowly here.
    """
    return keras.initializers.VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")
