"""Vision Transformers for small images, trained from scratch in Keras 3."""

import importlib
import pathlib
import sys
import typing

if typing.TYPE_CHECKING:  # At run time, `__getattr__` imports what is asked for.
    from keras_vit.attention import attention_rollout, attention_scores, patch_weights
    from keras_vit.data import load_dataset
    from keras_vit.layers import MixUpCutMix, Patches, RandomResizedCrop, TrivialAugment
    from keras_vit.loading import load_model
    from keras_vit.losses import LabelSmoothingCrossentropy
    from keras_vit.model import VisionTransformer
    from keras_vit.optimizers import Muon

__version__ = "0.1.0"

__all__ = [
    "LabelSmoothingCrossentropy",
    "MixUpCutMix",
    "Muon",
    "Patches",
    "RandomResizedCrop",
    "TrivialAugment",
    "VisionTransformer",
    "attention_rollout",
    "attention_scores",
    "load_dataset",
    "load_model",
    "patch_weights",
]
# Where each of them lives.
_HOMES = {
    "LabelSmoothingCrossentropy": "keras_vit.losses",
    "MixUpCutMix": "keras_vit.layers",
    "Muon": "keras_vit.optimizers",
    "Patches": "keras_vit.layers",
    "RandomResizedCrop": "keras_vit.layers",
    "TrivialAugment": "keras_vit.layers",
    "VisionTransformer": "keras_vit.model",
    "attention_rollout": "keras_vit.attention",
    "attention_scores": "keras_vit.attention",
    "load_dataset": "keras_vit.data",
    "load_model": "keras_vit.loading",
    "patch_weights": "keras_vit.attention",
}


def __getattr__(name: str) -> typing.Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def _is_command_line():
    """Whether this is a command of ours, which chooses Keras's backend before it imports Keras."""
    words = sys.orig_argv
    if sys.argv[:1] == ["-m"] and ("-m", "keras_vit") in zip(words, words[1:]):
        return True  # Python is about to run `__main__.py`.
    script = getattr(sys.modules["__main__"], "__file__", None)
    train = pathlib.Path(__file__).resolve().parents[1] / "train.py"
    script = script and pathlib.Path(script).resolve()
    return script is not None and (script == train or script.name in ("keras-vit", "keras-vit.exe"))


# Everyone else finds the classes registered, so that `keras.saving.load_model` needs no more.
if not _is_command_line():
    importlib.import_module("keras_vit.model")
    importlib.import_module("keras_vit.losses")
    importlib.import_module("keras_vit.optimizers")
