"""Weights of one model in another, for other classes or images of another size.

All weights fit images of any size but the position embeddings, which are interpolated (as
Dosovitskiy et al., 2021, do before fine-tuning at a higher resolution).
"""

import numpy as np
from keras import ops

from keras_vit.layers import RandomResizedCrop
from keras_vit.model import layers_in_inference, nested_layers
from keras_vit.validation import shape_of_image


def adapted(
    model, num_classes=None, class_names=None, image_shape=None, augmentation=None, dtype=None
):
    """A new model with the weights of another one, for other classes or images of another size.

    Args:
        model: a `VisionTransformer`.
        num_classes: int, number of classes; by default that of `class_names`, else the model's.
        class_names: list of strings; by default the model's, if the number of classes is too.
        image_shape: tuple `(H, W, C)`; by default the model's.
        augmentation: list of layers; by default the model's, whose `RandomResizedCrop` give
            images of the new size.
        dtype: dtype policy of the layers; by default the global policy.

    Returns:
        A `VisionTransformer`, not compiled, all of whose layers are trainable. With other classes
        its head is zero, so that it starts from the features alone (Dosovitskiy et al., 2021).

    Raises:
        ValueError: if the number of channels differs, or as the constructor does.
    """
    config = model.get_config()
    config.pop("trainable_layers")
    image_shape = shape_of_image(config["image_shape"] if image_shape is None else image_shape)
    if image_shape[2:] != tuple(config["image_shape"][2:]):
        raise ValueError(
            f"Expected `image_shape` to be (H, W, {config['image_shape'][2]}), as the model was "
            f"trained with this number of channels. Received: image_shape={image_shape}"
        )
    if num_classes is None:
        num_classes = config["num_classes"] if class_names is None else len(class_names)
    names = config["class_names"] if num_classes == config["num_classes"] else None
    if class_names is not None:
        names = [str(name) for name in class_names]
    same_classes = num_classes == config["num_classes"] and names == config["class_names"]
    if augmentation is None:
        augmentation = config["augmentation"]
        if image_shape != tuple(config["image_shape"]):
            augmentation = with_crops_of(augmentation, image_shape[:2])
    new = type(model).from_config(
        {
            **config,
            "num_classes": num_classes,
            "class_names": names,
            "image_shape": image_shape,
            "augmentation": augmentation,
            "dtype": dtype,
        }
    )
    copy_weights(model, new, head=same_classes)
    return new


def copy_weights(source, target, head=True):
    """Gives a model the weights of another one of the same architecture.

    Position embeddings are interpolated where the number of patches differs. Seeds of random
    layers stay as they are.

    Args:
        source: a `VisionTransformer`.
        target: another one, perhaps with other images or classes.
        head: bool, whether the head is copied; else it becomes zero.

    Raises:
        ValueError: if the target lacks a layer that changes images in inference, or if the source
            is quantized and the target is not in the same way.
    """
    if not (head and quantization(source) == quantization(target)):
        check_not_quantized(source)
    layers = {layer.name: layer for layer in target.layers}
    missing = [x for x in source.augmentation if x.name not in layers]
    if any(not isinstance(x, RandomResizedCrop) for x in missing):
        acting = [x.name for x in layers_in_inference(source) if x in missing]
        if acting:
            raise ValueError(
                "Expected augmentation layers that leave images as they are in inference: the "
                f"weights depend on those that do not. Received: {', '.join(acting)}"
            )
    grids = grid(source), grid(target)
    for layer in source.layers:
        if layer.name not in layers:  # Of an augmentation that the target does without.
            continue
        pairs = zip(_saved(layer), _saved(layers[layer.name]), strict=True)
        for variable, new in pairs:
            if layer.name == "head" and not head:
                new.assign(np.zeros(new.shape))
                continue
            value = ops.convert_to_numpy(variable)
            if layer.name == "position_embedding":
                value = resampled_positions(value, *grids)
            new.assign(value)


def quantization(model):
    """The quantization modes of a model's layers, nested ones included, by path."""
    modes = {path: layer.quantization_mode for path, layer, _ in nested_layers(model)}
    return {path: mode for path, mode in modes.items() if mode}


def check_not_quantized(model):
    """Raises a `ValueError` for a quantized model."""
    for name, mode in quantization(model).items():
        raise ValueError(
            f"Expected a model that is not quantized. Received: layer {name!r} with "
            f"quantization_mode={mode!r}"
        )


def _saved(layer):
    """The variables of a layer but its seeds: another model draws other random numbers."""
    return [x for x in layer.variables if "seed_generator" not in x.path]


def with_crops_of(augmentation, size):
    """The config of augmentation layers, with each `RandomResizedCrop` for another size.

    Args:
        augmentation: list of configs of layers, as in `VisionTransformer.get_config`.
        size: pair `(height, width)` in pixels.

    Returns:
        List of configs.
    """
    return [
        {**layer, "config": {**layer["config"], "height": size[0], "width": size[1]}}
        if layer["class_name"] == RandomResizedCrop.__name__
        else layer
        for layer in augmentation
    ]


def grid(model):
    """Rows and columns of a model's patches."""
    patches = model.get_layer("patches")
    return tuple(side // patches.patch_size for side in patches.input.shape[1:3])


def resampled_positions(table, before, after):
    """Position embeddings for another grid of patches, by linear interpolation with antialiasing.

    Args:
        table: array `(1, T, D)`; a class token's position, which comes first, stays as it is.
        before: pair, rows and columns of the patches of `table`.
        after: pair, rows and columns of the result.

    Returns:
        Array `(1, T, D)` of the same dtype; `table` itself for the same grid.
    """
    if before == after:
        return table
    count = before[0] * before[1]
    token, patches = table[:, :-count], table[:, -count:]
    patches = patches.reshape(1, *before, -1).astype("float32")
    patches = ops.image.resize(
        patches, after, "bilinear", antialias=True, data_format="channels_last"
    )
    patches = ops.convert_to_numpy(patches).reshape(1, after[0] * after[1], -1)
    return np.concatenate([token, patches.astype(table.dtype)], axis=1)
