"""Weights in the files of PyTorch's timm: the names and shapes of its `VisionTransformer`.

Its patch embedding is a convolution whose stride is its kernel's side: the same linear map as the
model's patches and their embedding, with the weights in another order.
"""

import json
import math
import os
import pathlib

import numpy as np
from keras import ops

from keras_vit.files import atomic_write
from keras_vit.loading import ModelError
from keras_vit.model import VisionTransformer, layers_in_inference
from keras_vit.transfer import check_not_quantized

# Head counts of timm's own architectures, whose names start with these.
HEADS = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12, "vit_large": 16, "vit_huge": 16}
# What timm calls what the head reads.
POOLS = {"token": "token", "mean": "avg"}
SHOWN = 5  # Most tensors that an error lists.


def write_timm(model: VisionTransformer, path: pathlib.Path) -> None:
    """Writes a model's weights to a `.safetensors` file, as timm's `VisionTransformer` has them.

    What timm's names do not tell (heads, normalization, class names) is in the file's metadata,
    under `keras_vit`. `timm.models.VisionTransformer(**arguments)` with `arguments` from there
    loads the file; it takes images from 0 to 1 from which `mean` is subtracted and which are
    divided by `std`.

    Args:
        model: a `VisionTransformer`. Its augmentation is left out.
        path: `Path` of the file.

    Raises:
        ValueError: if the model is quantized, or if its augmentation changes images in inference.
    """
    from safetensors.numpy import save_file

    check_not_quantized(model)
    if acting := layers_in_inference(model):
        raise ValueError(
            "Expected a model that takes images as they are, as timm's does: a layer that resizes "
            "or rescales them would be left out. "
            f"Received: {', '.join(layer.name for layer in acting)}"
        )
    config = model.get_config()
    height, width, channels = config["image_shape"]
    normalization = model.get_layer("normalization")
    mean, scale = map(ops.convert_to_numpy, (normalization.mean, normalization.scale))
    ratio = config["mlp_dim"] / config["embed_dim"]
    if int(config["embed_dim"] * ratio) != config["mlp_dim"]:  # As timm has it.
        ratio = math.nextafter(ratio, math.inf)
    facts = {
        "arguments": {
            "img_size": [height, width],
            "patch_size": config["patch_size"],
            "in_chans": channels,
            "num_classes": config["num_classes"],
            "embed_dim": config["embed_dim"],
            "depth": config["depth"],
            "num_heads": config["num_heads"],
            "mlp_ratio": ratio,
            "class_token": model.pooling == "token",
            "global_pool": POOLS[model.pooling],
            "fc_norm": False,
        },
        "mean": (mean / 255).tolist(),
        "std": (scale / 255).tolist(),
        "class_names": config["class_names"],
        "resize": model.resize,
    }
    tensors = {
        name: np.ascontiguousarray(array, "float32") for name, array in _to_timm(model).items()
    }
    with atomic_write(path) as part:
        save_file(tensors, part, {"format": "pt", "keras_vit": json.dumps(facts)})


def read_timm(path: str | os.PathLike[str]) -> VisionTransformer:
    """Reads a `.safetensors` file of timm's `VisionTransformer`, as the Hugging Face Hub has them.

    Heads, normalization and class names are those of the file's metadata, or of timm's
    `config.json` beside it.

    Args:
        path: string or `Path` of the file.

    Returns:
        A `VisionTransformer` with the same weights, and with the default augmentation.

    Raises:
        ModelError: if the file cannot be read, if the architecture is another one, or if heads or
            normalization are not known.
    """
    path = pathlib.Path(path)
    tensors, facts = _read(path)
    try:
        kernel = tensors["patch_embed.proj.weight"]
        embed_dim, channels, patch_size, _ = kernel.shape
        pooling = "token" if "cls_token" in tensors else "mean"
        depth = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks."))
        mlp_dim, num_classes = (
            len(tensors[name]) for name in ("blocks.0.mlp.fc1.bias", "head.bias")
        )
        patches = tensors["pos_embed"].shape[1] - (pooling == "token")
    except (KeyError, ValueError) as error:
        raise ModelError(
            f"{path} holds no VisionTransformer of timm: expected a tensor {error}"
        ) from error
    side, size = math.isqrt(patches) * patch_size, facts["img_size"]
    if len(size) != 2 or math.prod(x // patch_size for x in size) != patches:
        size = (side, side)
    try:
        model = VisionTransformer(
            (*size, channels),
            num_classes,
            patch_size=patch_size,
            embed_dim=embed_dim,
            mlp_dim=mlp_dim,
            num_heads=facts["num_heads"],
            depth=depth,
            dropout=0.0,
            pooling=pooling,
            class_names=facts["class_names"],
            resize=facts.get("resize", "squash"),
            dtype="float32",
        )
    except ValueError as error:
        raise ModelError(f"{path} does not go with what describes it: {error}") from error
    expected = {name: array.shape for name, array in _to_timm(model).items()}
    found = {name: array.shape for name, array in tensors.items()}
    names = [x for x in {**expected, **found} if expected.get(x) != found.get(x)]
    if names:
        shown = [
            f"{name} is {found.get(name, 'missing')} and should be {expected.get(name, 'absent')}"
            for name in names[:SHOWN]
        ]
        rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
        raise ModelError(
            f"{path} has another architecture than this package's VisionTransformer: "
            f"{'; '.join(shown + rest)}"
        )
    mean, std = (255 * np.asarray(facts[name], "float32") for name in ("mean", "std"))
    if mean.shape != (channels,) or std.shape != (channels,):
        raise ModelError(
            f"{path} takes images of {channels} channels, but what describes it has "
            f"mean={facts['mean']} and std={facts['std']}"
        )
    if (pooled := facts.get("global_pool")) not in (None, POOLS[pooling]):
        raise ModelError(
            f"{path} has another architecture than this package's VisionTransformer: its head "
            f"reads global_pool={pooled!r}, expected {POOLS[pooling]!r} with its class token"
            + ("" if pooling == "token" else " left out")
        )
    _from_timm(model, tensors)
    model.get_layer("normalization").set_weights([mean, std**2, np.zeros(())])
    return model


def _read(path):
    """The tensors of a file as float32 by name, and what its names do not tell."""
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ModelError(
            f"{path} needs a package that is missing: try `pip install safetensors`"
        ) from error
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            tensors = {
                name: file.get_tensor(name).astype("float32") for name in sorted(file.keys())
            }
    except (OSError, SafetensorError, TypeError) as error:
        raise ModelError(f"{path} is not a .safetensors file that can be read: {error}") from error
    try:
        if "keras_vit" in metadata:
            facts = json.loads(metadata["keras_vit"])
            return tensors, {**facts, **facts["arguments"]}
        return tensors, _facts_of_timm(path.with_name("config.json"))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{path} does not tell its number of heads and its normalization, and timm's "
            f"config.json beside it does not either: {error!r}"
        ) from error


def _facts_of_timm(path):
    """Heads, normalization and class names, as timm's `config.json` has them."""
    config = json.loads(path.read_text(encoding="utf-8"))
    preprocessing, arguments = config["pretrained_cfg"], config.get("model_args", {})
    heads = arguments.get("num_heads")
    if heads is None:
        heads = next(
            (heads for name, heads in HEADS.items() if config["architecture"].startswith(name)),
            None,
        )
    if heads is None:
        raise ValueError(f"architecture {config['architecture']!r} is not known")
    return {
        "num_heads": heads,
        "global_pool": arguments.get("global_pool", config.get("global_pool")),
        "img_size": preprocessing.get("input_size", ())[1:],
        "mean": preprocessing["mean"],
        "std": preprocessing["std"],
        "class_names": config.get("label_names"),
    }


def _layers(model):
    """The layers of a model with weights, by timm's names."""
    yield "patch_embed.proj", model.get_layer("patch_embedding")
    for block in range(model.get_config()["depth"]):
        for name, ours in (
            ("norm1", "attention_norm"),
            ("attn", "attention"),
            ("norm2", "mlp_norm"),
            ("mlp.fc1", "mlp_hidden"),
            ("mlp.fc2", "mlp_output"),
        ):
            yield f"blocks.{block}.{name}", model.get_layer(f"block_{block + 1}_{ours}")
    yield "norm", model.get_layer("norm")
    yield "head", model.get_layer("head")


def _to_timm(model):
    """The weights of a model as arrays, by timm's names."""
    width = model.get_config()["embed_dim"]
    tensors = {"pos_embed": model.get_layer("position_embedding").get_weights()[0]}
    if model.pooling == "token":
        tensors["cls_token"] = model.get_layer("class_token").get_weights()[0]
    for name, layer in _layers(model):
        weights = layer.get_weights()
        if name.endswith("attn"):
            # Query, key and value: kernels (D, A, D / A), biases (A, D / A).
            kernels, biases = weights[0:6:2], weights[1:6:2]
            stacked = np.concatenate([x.reshape(width, width) for x in kernels], axis=1)
            tensors[f"{name}.qkv.weight"] = stacked.T
            tensors[f"{name}.qkv.bias"] = np.concatenate([x.reshape(-1) for x in biases])
            tensors[f"{name}.proj.weight"] = weights[6].reshape(width, width).T
            tensors[f"{name}.proj.bias"] = weights[7]
            continue
        weight, bias = weights
        if name == "patch_embed.proj":
            side = model.get_layer("patches").patch_size
            weight = weight.reshape(side, side, -1, width).transpose(3, 2, 0, 1)
        elif weight.ndim == 2:
            weight = weight.T
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = weight, bias
    return tensors


def _from_timm(model, tensors):
    """Assigns arrays by timm's names to the weights of a model: the inverse of `_to_timm`."""
    width = model.get_config()["embed_dim"]
    model.get_layer("position_embedding").set_weights([tensors["pos_embed"]])
    if model.pooling == "token":
        model.get_layer("class_token").set_weights([tensors["cls_token"]])
    for name, layer in _layers(model):
        shapes = [tuple(x.shape) for x in layer.weights]
        if name.endswith("attn"):
            kernels = np.split(tensors[f"{name}.qkv.weight"].T, 3, axis=1)
            biases = np.split(tensors[f"{name}.qkv.bias"], 3)
            weights = [x for pair in zip(kernels, biases) for x in pair]
            weights += [tensors[f"{name}.proj.weight"].T, tensors[f"{name}.proj.bias"]]
        else:
            weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            if name == "patch_embed.proj":
                weight = weight.transpose(2, 3, 1, 0).reshape(-1, width)
            elif weight.ndim == 2:
                weight = weight.T
            weights = [weight, bias]
        layer.set_weights([x.reshape(shape) for x, shape in zip(weights, shapes, strict=True)])
