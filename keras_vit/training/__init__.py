"""Training a model from a recipe, in runs that can be interrupted at any time and resumed.

A recipe is any object with the fields of `keras_vit_cli.recipes.Recipe`.
"""

from keras_vit.training.checkpoints import FOLDER as CHECKPOINTS
from keras_vit.training.checkpoints import NAMES as CHECKPOINT_NAMES
from keras_vit.training.checkpoints import NOTE as CHECKPOINT_NOTE
from keras_vit.training.checkpoints import CannotExtend, DifferentVariables
from keras_vit.training.fitting import build_model, compile_model, fit
from keras_vit.training.flops import costs_of_epochs, operations
from keras_vit.training.journal import (
    BEST_MODEL,
    HISTORY,
    TIMING,
    DifferentData,
    Diverged,
    Interrupted,
    read_history,
)
from keras_vit.training.optimizers import Muon
from keras_vit.training.schedules import step_schedule

__all__ = [
    "BEST_MODEL",
    "CHECKPOINTS",
    "CHECKPOINT_NAMES",
    "CHECKPOINT_NOTE",
    "HISTORY",
    "TIMING",
    "Diverged",
    "Interrupted",
    "Muon",
    "DifferentData",
    "CannotExtend",
    "DifferentVariables",
    "build_model",
    "compile_model",
    "costs_of_epochs",
    "fit",
    "operations",
    "read_history",
    "step_schedule",
]
