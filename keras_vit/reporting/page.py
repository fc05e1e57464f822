"""The data of the page that runs a model in the browser."""

import base64
import math

import keras
import numpy as np

from keras_vit.model import EPSILON, check_is_vision_transformer, layers_in_inference
from keras_vit.transfer import check_not_quantized, grid

# A page holds 2.7 bytes for each parameter, and a browser 4 bytes for each attention score.
MAX_PARAMETERS = 20_000_000
MAX_SCORES = 2**25
LEVELS = 2**15 - 1


def pack(model):
    """A model as values for JSON, with 16 bits per weight.

    Args:
        model: a `VisionTransformer`.

    Returns:
        Dictionary of `sizes`; `mean` and `scale` of the normalization, lists of floats; `levels`,
        base64 of int16; and `steps`, base64 of float32. Kernels, biases and other weights follow
        each other in the order of the graph, as rows along their last axis: a weight is its level
        times the step of its row.

    Raises:
        ValueError: if the model is not a `VisionTransformer` for grey or RGB images; if a layer of
            its augmentation also acts in inference; if it is quantized; if its weights are not
            finite; or if it has more than 20 million parameters or 33 million attention scores.
    """
    _check(model)
    patches, config = model.get_layer("patches"), model.get_config()
    height, width, channels = config["image_shape"]
    rows, columns = grid(model)
    tensors = [_rows(weights) for weights in _weights(model, config["depth"])]
    steps = [np.abs(tensor).max(axis=1) / LEVELS for tensor in tensors]
    levels = [
        np.round(tensor / np.where(step == 0, 1, step)[:, None])
        for tensor, step in zip(tensors, steps)
    ]
    normalization = model.get_layer("normalization")
    return {
        "sizes": {
            **{"height": height, "width": width, "channels": channels},
            **{"patch": patches.patch_size, "rows": rows, "columns": columns},
            **{"dim": config["embed_dim"], "hidden": config["mlp_dim"]},
            **{"blocks": config["depth"], "heads": config["num_heads"]},
            "tokens": rows * columns + (model.pooling == "token"),
            "class_token": model.pooling == "token",
            "classes": config["num_classes"],
            "epsilon": EPSILON,
            "resize": model.resize,
            "parameters": sum(tensor.size for tensor in tensors),
        },
        "mean": _numpy(normalization.mean).tolist(),
        "scale": _numpy(normalization.scale).tolist(),
        "levels": _base64(levels, "<i2"),
        "steps": _base64(steps, "<f4"),
    }


def _check(model):
    """Raises a `ValueError` for a model that the page could not run as Keras does."""
    check_is_vision_transformer(model)
    received = f"Received: model={model.name!r}"
    channels = model.input_shape[-1]
    if channels not in (1, 3):
        raise ValueError(
            f"Expected a model for grey or RGB images, with 1 or 3 channels. {received} with "
            f"{channels}"
        )
    if acting := layers_in_inference(model):
        raise ValueError(
            "Expected a model whose augmentation leaves images as they are in inference, because "
            f"a page does not run those layers. {received} with layer {acting[0].name!r}, a "
            f"{type(acting[0]).__name__}"
        )
    check_not_quantized(model)
    config, tokens = model.get_config(), model.get_layer("position_embedding").output.shape[1]
    parameters = sum(math.prod(weight.shape) for weight in model.weights)
    if parameters > MAX_PARAMETERS:
        raise ValueError(
            f"Expected a model with at most {MAX_PARAMETERS:,} parameters. {received} with "
            f"{parameters:,}"
        )
    scores = config["depth"] * config["num_heads"] * tokens**2
    if scores > MAX_SCORES:
        raise ValueError(
            f"Expected a model with at most {MAX_SCORES:,} attention scores per image. {received} "
            f"with {scores:,}"
        )
    for weight in model.weights:
        if not np.isfinite(_numpy(weight)).all():
            raise ValueError(f"Expected finite weights. {received}, whose {weight.path} has NaN")


def _weights(model, depth):
    """All weights after the normalization of pixels, in the order in which they are computed with.

    Yields:
        Tensors, whose last axes are the outputs of their layer.
    """

    def dense(name):
        layer = model.get_layer(name)
        return layer.kernel, layer.bias

    def norm(name):
        layer = model.get_layer(name)
        return layer.gamma, layer.beta

    yield from dense("patch_embedding")
    if model.pooling == "token":
        yield model.get_layer("class_token").token
    yield model.get_layer("position_embedding").position
    for block in range(1, depth + 1):
        name = f"block_{block}"
        yield from norm(f"{name}_attention_norm")
        attention = model.get_layer(f"{name}_attention")
        for layer in (attention.query_dense, attention.key_dense, attention.value_dense):
            yield keras.ops.reshape(layer.kernel, (layer.kernel.shape[0], -1))
            yield keras.ops.reshape(layer.bias, (-1,))
        yield attention.output_dense.kernel
        yield attention.output_dense.bias
        yield from norm(f"{name}_mlp_norm")
        yield from dense(f"{name}_mlp_hidden")
        yield from dense(f"{name}_mlp_output")
    yield from norm("norm")
    yield from dense("head")


def _rows(weights):
    """Weights as float64 rows along their last axis."""
    return _numpy(weights).reshape(-1, weights.shape[-1])


def _numpy(tensor):
    return keras.ops.convert_to_numpy(tensor).astype("float64")


def _base64(arrays, dtype):
    joined = np.concatenate([array.ravel() for array in arrays])
    return base64.b64encode(joined.astype(dtype).tobytes()).decode()
