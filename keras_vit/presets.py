"""Pretrained weights that come with the package, each with its model card."""

import io
import os
import pathlib
import zipfile

import h5py
import numpy as np

from keras_vit.files import atomic_write
from keras_vit.loading import ModelError, load_model
from keras_vit.model import ADVICE, VisionTransformer
from keras_vit.timm import read_timm
from keras_vit.transfer import copy_weights

FOLDER = pathlib.Path(__file__).with_name("weights")
WEIGHTS = "model.weights.h5"  # Keras's name for the weights in a `.keras` file.


def list_presets() -> dict[str, str]:
    """The names of the pretrained models in the package, with their model cards in Markdown."""
    return {path.stem: path.read_text(encoding="utf-8") for path in sorted(FOLDER.glob("*.md"))}


def load_preset(name: str | os.PathLike[str]) -> VisionTransformer:
    """Loads a pretrained model by its name, or a model from a `.keras` file.

    Args:
        name: string, one of `list_presets()`; or the path of a `.keras` file of this package, or
            of a `.safetensors` file of timm's `VisionTransformer`.

    Returns:
        A `VisionTransformer`.

    Raises:
        ModelError: if there is no such preset or file, or if it cannot be loaded safely.
    """
    path = pathlib.Path(name)
    if str(name) in list_presets():
        path = FOLDER / f"{name}.keras"
    elif path.suffix == ".safetensors":
        return read_timm(path)
    elif path.suffix != ".keras" and not path.is_dir():
        raise ModelError(
            f"{name} is neither a .keras or .safetensors file nor a preset: the presets are "
            f"{', '.join(list_presets())}"
        )
    model = load_model(path)
    if not isinstance(model, VisionTransformer):
        kind = type(model).__name__
        raise ModelError(f"{name} holds a {kind}, not a VisionTransformer. {ADVICE}")
    return model


def write_preset(model: VisionTransformer, path: pathlib.Path) -> None:
    """Writes a model to a `.keras` file in half precision and without its optimizer.

    Weights with two or more axes are stored as float16, with an error of at most one part in 2,048,
    or 3e-8 below 6e-5; normalization, gains and one-dimensional biases stay in float32.
    It loads as any other `.keras` file, in float32.

    Args:
        model: a `VisionTransformer`.
        path: `Path` of the file.

    Raises:
        ValueError: if a weight is too large for float16.
    """
    config = {**model.get_config(), "dtype": "float32"}
    bare = VisionTransformer.from_config(config)
    copy_weights(model, bare)
    with atomic_write(path) as part:
        bare.save(part)
        with zipfile.ZipFile(part) as archive:
            members = {name: archive.read(name) for name in archive.namelist()}
        members[WEIGHTS] = _halved(members[WEIGHTS])
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in members.items():
                archive.writestr(name, content)


def _halved(content):
    """The bytes of an HDF5 file, with its matrices as float16."""
    result = io.BytesIO()
    with h5py.File(io.BytesIO(content)) as source, h5py.File(result, "w") as target:

        def copy(name, item):
            if isinstance(item, h5py.Group):
                group = target.require_group(name)
                group.attrs.update(item.attrs)
                return
            value = item[()]
            if value.ndim > 1 and value.dtype == np.float32:
                value = value.astype("float16")
                if not np.isfinite(value).all():
                    raise ValueError(
                        "Expected weights below 65,504, the largest number of float16. Received: "
                        f"{name} with {np.abs(item[()]).max()}"
                    )
            target.create_dataset(name, data=value).attrs.update(item.attrs)

        target.attrs.update(source.attrs)
        source.visititems(copy)
    return result.getvalue()
