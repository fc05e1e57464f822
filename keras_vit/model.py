"""The Vision Transformer as one functional graph, from raw pixels to logits.

After augmentation and normalization, its layers are those of figure 1 of Dosovitskiy et al. (2021),
for the blocks `i` from 1 to `depth`:

    z_0  = [class; patches E] + positions  patches, patch_embedding, class_token, position_embedding
    z'_i = MSA(LN(z_i-1)) + z_i-1          block_<i>_attention_norm, _attention, _attention_sum
    z_i  = MLP(LN(z'_i)) + z'_i            block_<i>_mlp_norm, _mlp_hidden, _mlp_output, _mlp_sum
    y    = LN(z_depth)[0]                  norm, class_token_output

`head` turns `y` into logits. With `pooling="mean"` there is no class token, and `y` is the mean
over the patches. The last block computes only the tokens that the head reads.
"""

import math
import os
import typing
import warnings
from collections.abc import Sequence

import keras
import numpy as np
from keras import ops

from keras_vit.devices import without_gradients
from keras_vit.jax_multi_step import can_scan, scanned_train_function
from keras_vit.layers import (
    ClassToken,
    Dropout,
    FirstToken,
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
from keras_vit.validation import fraction_below_one, positive_integer, resizing, shape_of_image

EPSILON = 1e-6
MOST_SCORES = 2**28  # Attention scores of a block in inference: one GiB.
# For those whose model was made from a `VisionTransformer` but is none itself.
ADVICE = (
    "In place of `keras.models.clone_model(model)`, use `VisionTransformer.from_config("
    "model.get_config())` and `set_weights`; for another head, `VisionTransformer.from_preset`"
)


@keras.saving.register_keras_serializable("keras_vit")
class VisionTransformer(keras.Model):
    """Vision Transformer (Dosovitskiy et al., 2021) with built-in preprocessing.

    Augmentation and normalization are the first layers of the model: it takes
    raw pixels, augments them in `fit` and with `training=True` only, and a
    saved model cannot be deployed with the wrong preprocessing.

    Input shape:
        4D tensor `(B, H, W, C)`, integers or floats from 0 to 255.

    Output shape:
        2D tensor `(B, num_classes)`, logits.

    Args:
        image_shape: tuple `(H, W, C)`, the shape of one image.
        num_classes: int, number of classes.
        patch_size: int, side `P` of a patch in pixels; must divide `H` and `W` as
            they are after `augmentation`.
        embed_dim: int, width `D` of a token; must be a multiple of `num_heads`.
        mlp_dim: int, width of the hidden layer of a block's MLP.
        num_heads: int, attention heads `A` of a block.
        depth: int, number of blocks `L`.
        dropout: float in [0, 1), rate of all dropout layers, including attention's.
        stochastic_depth: float in [0, 1), probability of dropping the last
            block's attention, and its MLP, for an image in training (drop
            path). The rate grows linearly from the first block (Huang et
            al., 2016).
        pooling: string, what the head reads: `"token"`, a class token in
            front of the patches, or `"mean"`, the mean of all patch tokens,
            without a class token.
        class_names: list of strings, one per class, saved with the model; none
            by default.
        augmentation: list of layers that are applied to the images before
            normalization, in order. By default a horizontal flip and a
            `RandomResizedCrop` to the same size; `[]` for none. Keras's
            random layers act in training only; others, such as `Resizing`,
            always. With a `MixUpCutMix` among them, the loss mixes the labels
            as well.
        dtype: dtype policy of the layers, such as `"mixed_bfloat16"`; by
            default the global policy. Pixels and logits stay in float32.
        resize: string, how image files of another aspect ratio are fitted to
            `image_shape`, saved with the model for `keras_vit.predict`:
            `"squash"`, `"crop"` or `"pad"`, as for `keras_vit.read_image`.
        **kwargs: base model keyword arguments, such as `name`.

    Raises:
        ValueError: if an argument is out of range, if `num_heads` does not divide
            `embed_dim` or `patch_size` does not divide the image, if the number
            of class names is not `num_classes`, or if `augmentation` contains
            something that is not a layer, does not return images, or mixes
            images without their labels.

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
        resize: str = "squash",
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
        dropout = fraction_below_one("dropout", dropout)
        stochastic_depth = fraction_below_one("stochastic_depth", stochastic_depth)
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
        resize = resizing(resize)
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
                "Expected `augmentation` to contain at most one `MixUpCutMix`. "
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
            # The head reads the class token only: the last block skips the others.
            tokens = 1 if block == depth and pooling == "token" else None
            name = f"block_{block}"
            drop_path = stochastic_depth * block / depth
            x = transformer_block(x, mlp_dim, num_heads, dropout, name, tokens, drop_path, policy)
        x = LayerNormalization(epsilon=EPSILON, dtype=policy, name="norm")(x)
        if pooling == "token":
            x = FirstToken(dtype=policy, name="class_token_output")(x)
        else:
            x = keras.layers.GlobalAveragePooling1D(dtype="float32", name="mean_of_patches")(x)
        logits = dense(num_classes, dtype="float32", name="head")(x)

        super().__init__(inputs=images, outputs=logits, **kwargs)
        self.augmentation = augmentation
        self._mixing = mixing
        names = None if class_names is None else tuple(map(str, class_names))
        self.class_names = names
        self.pooling = pooling
        self.resize = resize
        # Short digests of the image files that the model was trained or validated on, if known.
        self.seen = ()
        self._config = {
            "image_shape": image_shape,
            "dropout": dropout,
            "stochastic_depth": stochastic_depth,
            "pooling": pooling,
            "class_names": names and list(names),
            "dtype": policy.name,
            "resize": resize,
            **sizes,
        }

    @classmethod
    def from_preset(
        cls,
        name: str | os.PathLike[str],
        num_classes: int | None = None,
        class_names: Sequence[str] | None = None,
        image_shape: tuple[int, int, int] | None = None,
        augmentation: Sequence[keras.layers.Layer] | None = None,
        dtype: str | keras.DTypePolicy | None = None,
    ) -> "VisionTransformer":
        """A model with pretrained weights, for its own classes and image size or for others.

        Position embeddings are interpolated for another image size. With other classes the head is
        new and starts at zero, so that training starts from the features alone. The normalization
        is that of the pretrained model: there is no need for `adapt`.

        Args:
            name: string, a preset such as `"cifar10-quick"` (`keras_vit.list_presets()` describes
                them); or the path of a `.keras` file, or of a `.safetensors` file of timm.
            num_classes: int, number of classes; by default that of `class_names`, else the
                preset's.
            class_names: list of strings; by default the preset's, for as many classes.
            image_shape: tuple `(H, W, C)`, with the preset's `C`; by default the preset's.
            augmentation: list of layers; by default the preset's, whose crops give images of the
                new size.
            dtype: dtype policy of the layers; by default the global policy.

        Returns:
            A `VisionTransformer`, not compiled.

        Raises:
            ModelError: if there is no such preset or file, or if it cannot be loaded safely.
            ValueError: if an argument does not suit the preset or the others.

        Example:

        >>> model = keras_vit.VisionTransformer.from_preset(
        ...     "cifar10-quick", class_names=["ant", "bee"], image_shape=(64, 64, 3)
        ... )
        >>> model.output_shape
        (None, 2)
        """
        # Files are read above models.
        from keras_vit.presets import load_preset
        from keras_vit.transfer import adapted

        preset = load_preset(name)
        return adapted(preset, num_classes, class_names, image_shape, augmentation, dtype)

    @property
    def scores_per_block(self) -> int:
        """Number of attention scores of an image in a block: a matrix for each head."""
        tokens = self.get_layer("position_embedding").position.shape[1]
        return self._config["num_heads"] * tokens**2

    def features(self, images: np.ndarray, batch_size: int = 256) -> np.ndarray:
        """What the head reads: the class token, or the mean of the patches, after the last block.

        Args:
            images: array `(B, H, W, C)` of raw pixels.
            batch_size: int, largest number of images that are computed at once; of images with
                many patches, there are fewer.

        Returns:
            NumPy array `(B, D)`, float32.
        """
        backbone = keras.Model(self.input, self.get_layer("head").input)
        size = max(1, min(batch_size, MOST_SCORES // self.scores_per_block))
        parts = [np.empty((0, backbone.output_shape[-1]), "float32")]
        with without_gradients():
            for start in range(0, len(images), size):
                part = backbone(images[start : start + size], training=False)
                parts.append(ops.convert_to_numpy(part).astype("float32"))
        return np.concatenate(parts)

    def adapt(self, images: np.ndarray) -> None:
        """Computes mean and variance per channel; call it before `fit`, with the training images.

        They are computed on the input of the normalization, after the layers of `augmentation` in
        inference mode. A constant channel is centered but not scaled, with a warning.

        Args:
            images: array `(B, H, W, C)` of raw pixels.

        Raises:
            ValueError: if the images are no array, if there are none, or if they do not have the
                model's input shape.
        """
        if not hasattr(images, "shape"):
            raise ValueError(
                "Expected `images` to be an array of shape (B, H, W, C): convert a list by "
                "`np.stack`, and the batches of a data set by `np.concatenate`. "
                f"Received: images of type {type(images).__name__}"
            )
        if tuple(images.shape[1:]) != self.input_shape[1:] or not len(images):
            expected = ", ".join(map(str, self.input_shape[1:]))
            raise ValueError(
                f"Expected `images` to be a non-empty array of shape (B, {expected}). "
                f"Received: images.shape={tuple(images.shape)}"
            )
        normalization = self.get_layer("normalization")
        preprocessing = keras.Model(self.input, normalization.input)
        # A few megabytes at a time: all of them as floats would fill the memory.
        shapes = preprocessing.input_shape, preprocessing.output_shape
        largest = max(math.prod(shape[1:]) for shape in shapes)
        size = max(1, 2**22 // largest)
        groups = (images[start : start + size] for start in range(0, len(images), size))
        normalization.adapt(ops.convert_to_numpy(preprocessing(x, training=False)) for x in groups)

    def compute_loss(self, x=None, y=None, y_pred=None, sample_weight=None, training=True):
        """Keras's loss of a batch; if `MixUpCutMix` mixed the images, it mixes their labels too."""
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
        """Builds Keras's train function, or a faster one on JAX; called by `fit`."""
        is_new = force or self.train_function is None
        if is_new and not self._is_adapted():
            warnings.warn(
                "The model has not been adapted: images from 0 to 255 reach its first layers "
                "without normalization. Call `model.adapt(train_images)` before `fit`.",
                stacklevel=3,
            )
        super().make_train_function(force)
        if is_new and can_scan(self):
            self.train_function = scanned_train_function(self)

    def _is_adapted(self):
        """Whether pixels are normalized: by `adapt`, or by layers of `augmentation` to a few."""
        normalization = self.get_layer("normalization")
        mean, variance = map(ops.convert_to_numpy, (normalization.mean, normalization.variance))
        if mean.any() or (variance != 1).any():
            return True
        preprocessing = keras.Model(self.input, normalization.input)
        white = np.full((1, *self.input_shape[1:]), 255, "float32")
        return bool(np.abs(ops.convert_to_numpy(preprocessing(white, training=False))).max() < 10)

    def get_config(self):
        layers = [keras.saving.serialize_keras_object(layer) for layer in self.augmentation]
        inside = list(nested_layers(self))
        return {
            **self._config,
            "augmentation": layers,
            "name": self.name,
            "seen": list(self.seen),
            "trainable_layers": {
                **({} if self.trainable else {"": False}),  # The whole model.
                **{
                    path: layer.trainable
                    for path, layer, parent in inside
                    if layer.trainable != parent.trainable
                },
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
        # Files of earlier versions list the frozen layers.
        trainable = dict.fromkeys(settings.pop("frozen", ()), False)
        trainable |= settings.pop("trainable_layers", {})
        quantized = settings.pop("quantized_layers", {})
        seen = settings.pop("seen", ())
        model = cls(**settings)
        model.seen = tuple(seen)
        if not trainable.get("", True):
            model.trainable = False
        for path, layer, _ in nested_layers(model):
            if path in quantized and layer.quantization_mode is None:
                how = keras.saving.deserialize_keras_object(quantized[path]["config"])
                layer.quantize(quantized[path]["mode"], config=how)
            if path in trainable:
                layer.trainable = trainable[path]
        return model


def nested_layers(layer, path=""):
    """Path, layer and parent of all nested layers, each before its own nested layers."""
    for inner in layer._flatten_layers(include_self=False, recursive=False):
        yield path + inner.name, inner, layer
        yield from nested_layers(inner, f"{path}{inner.name}/")


def _quantization(layer):
    """The quantization of a layer, as saved in a file."""
    config = getattr(layer, "quantization_config", None)
    return {
        "mode": layer.quantization_mode,
        "config": keras.saving.serialize_keras_object(config),
    }


def _checked(augmentation):
    """Checks that `augmentation` is a list of layers that a model can apply; returns the list."""
    if not isinstance(augmentation, Sequence) or not all(
        isinstance(layer, keras.layers.Layer) for layer in augmentation
    ):
        raise ValueError(
            "Expected `augmentation` to be a list of Keras layers. "
            f"Received: augmentation={augmentation!r}"
        )
    # Layers of the user may have been given the names of the model's own layers.
    names = ["normalization", "dropout", *(layer.name for layer in augmentation)]
    for layer in augmentation:
        if names.count(layer.name) > 1:
            raise ValueError(
                "Expected each layer of `augmentation` to have a unique name within the model. "
                f"Received: name={layer.name!r} twice. Pass another `name` to this "
                f"{type(layer).__name__}."
            )
        for inner in layer._flatten_layers():
            if isinstance(inner, (keras.layers.MixUp, keras.layers.CutMix)):
                raise ValueError(
                    "Expected layers in `augmentation` that keep the labels valid. Received: "
                    f"layer {inner.name!r}, a `keras.layers.{type(inner).__name__}`, which would "
                    "mix only the images. Use `keras_vit.MixUpCutMix`: the loss mixes the labels."
                )
    return list(augmentation)


def _augmented(images, augmentation):
    """Symbolic images `(B, H, W, C)` after the layers of `augmentation`."""
    for layer in augmentation:
        # Keras's image layers default to training mode. The `training` that the model is called
        # with, as by `fit`, takes precedence over this one.
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
    """The default augmentation: a horizontal flip with probability 0.5, then a random crop.

    Args:
        image_shape: tuple `(H, W, C)`.
        horizontal_flip: bool; digits and letters must not be mirrored.
        **crop: arguments of `RandomResizedCrop`, such as `scale`.
    """
    height, width, _ = image_shape
    pixel_options: dict[str, typing.Any] = {"data_format": "channels_last", "dtype": "float32"}
    flip = keras.layers.RandomFlip("horizontal", name="random_flip", **pixel_options)
    crop = RandomResizedCrop(height, width, name="random_resized_crop", **pixel_options, **crop)
    return [flip, crop] if horizontal_flip else [crop]


def augmented_for_display(layers, images, training=False):
    """Augmented images in a range that can be displayed.

    Changes of the range of pixels, such as by `Rescaling`, are undone per channel: the values that
    a black and a white image are mapped to become 0 and 255 again.

    Args:
        layers: list of layers.
        images: array `(B, H, W, C)`, 0 to 255.
        training: bool, whether random layers act.

    Returns:
        Array of float32, in the output size of the layers.
    """

    def augmented(images, training=False):
        for layer in layers:
            images = layer(images, training=training)
        return ops.convert_to_numpy(images).astype("float32")

    # Displaying images must not change the random numbers of training.
    state = [(variable, variable.numpy()) for layer in layers for variable in layer.variables]

    images = np.asarray(images, "float32")
    result = augmented(images, training)
    for variable, value in state:
        variable.assign(value)
    black, white = (
        augmented(np.full_like(images[:1], value)).mean(axis=(0, 1, 2)) for value in (0, 255)
    )
    is_constant = np.isclose(black, white)
    black = np.where(is_constant, result.min(axis=(0, 1, 2)), black)
    white = np.where(is_constant, result.max(axis=(0, 1, 2)), white)
    return 255 * (result - black) / np.where(white == black, 1, white - black)


def check_is_vision_transformer(model: keras.Model) -> None:
    """Raises a `ValueError` for another model, which says how a copy becomes one."""
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            "Expected `model` to be a `VisionTransformer`. Received: model of class "
            f"{type(model).__name__}. {ADVICE}"
        )


def layers_in_inference(model: VisionTransformer) -> list[keras.layers.Layer]:
    """The layers of a model's augmentation that also change images in inference."""
    noise = np.random.default_rng(0).uniform(0, 255, (4, *model.input_shape[1:]))
    noise[0], noise[1] = 0, 255
    images, kept = noise.astype("float32"), []
    for layer in model.augmentation:
        before = images
        images = ops.convert_to_numpy(layer(before, training=False))
        if not np.array_equal(before, images):
            kept.append(layer)
    return kept


def transformer_block(x, mlp_dim, num_heads, dropout, name, tokens=None, drop_path=0.0, dtype=None):
    """One pre-norm block: `x + MHA(LN(x))`, then `x + MLP(LN(x))`.

    Args:
        x: tokens `(B, T, D)`.
        mlp_dim: int, width of the MLP's hidden layer.
        num_heads: int, attention heads.
        dropout: float, rate of all dropout layers.
        name: string, prefix of the names of the block's layers.
        tokens: int, number of leading tokens that the block computes; all by default. They
            attend to all `T` tokens.
        drop_path: float, probability of dropping the attention branch, and independently the MLP
            branch, of an image in training.
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
    attended = _drop_path(attended, drop_path, dtype, f"{name}_attention_skip")
    x = keras.layers.Add(dtype=dtype, name=f"{name}_attention_sum")([x, attended])

    y = LayerNormalization(epsilon=EPSILON, dtype=dtype, name=f"{name}_mlp_norm")(x)
    y = dense(mlp_dim, activation=gelu, dtype=dtype, name=f"{name}_mlp_hidden")(y)
    y = Dropout(dropout, dtype=dtype, name=f"{name}_mlp_hidden_dropout")(y)
    y = dense(width, dtype=dtype, name=f"{name}_mlp_output")(y)
    y = Dropout(dropout, dtype=dtype, name=f"{name}_mlp_output_dropout")(y)
    y = _drop_path(y, drop_path, dtype, f"{name}_mlp_skip")
    return keras.layers.Add(dtype=dtype, name=f"{name}_mlp_sum")([x, y])


def _drop_path(x, rate, dtype, name):
    """Drop path: in training, zeroes the tokens `(B, T, D)` of an image with probability `rate`."""
    if not rate:
        return x
    return keras.layers.Dropout(rate, noise_shape=(None, 1, 1), dtype=dtype, name=name)(x)


def dense(units, **kwargs):
    """A Dense layer with the kernel initializer of the model."""
    return keras.layers.Dense(units, kernel_initializer=kernel_initializer(), **kwargs)


def kernel_initializer():
    """Uniform with variance `1 / (3 * inputs)`, PyTorch's default for linear layers.

    Keras's default, Glorot uniform, is up to twice as large and trains more slowly here.
    """
    return keras.initializers.VarianceScaling(1 / 3, mode="fan_in", distribution="uniform")
