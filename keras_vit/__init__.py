"""Vision Transformers for small images, trained from scratch in Keras 3."""

import importlib
import pathlib
import sys

__version__ = "0.1.0"

# Where each public name lives.
_HOMES = {
    "LabelSmoothingCrossentropy": "keras_vit.losses",
    "MixUpCutMix": "keras_vit.layers",
    "Patches": "keras_vit.layers",
    "RandomResizedCrop": "keras_vit.layers",
    "TrivialAugment": "keras_vit.layers",
    "VisionTransformer": "keras_vit.model",
    "attention_rollout": "keras_vit.attention",
    "attention_scores": "keras_vit.attention",
    "load_dataset": "keras_vit.data",
    "load_model": "keras_vit.loading",
}
__all__ = list(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _is_command_line():
    """Whether this process is `train.py`, which chooses Keras's backend before it imports Keras."""
    script = getattr(sys.modules["__main__"], "__file__", None)
    train = pathlib.Path(__file__).resolve().parents[1] / "train.py"
    return script is not None and pathlib.Path(script).resolve() == train


# Everyone else finds the classes registered, so that `keras.saving.load_model` needs no more.
if not _is_command_line():
    importlib.import_module("keras_vit.model")
    importlib.import_module("keras_vit.losses")
