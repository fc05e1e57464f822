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
