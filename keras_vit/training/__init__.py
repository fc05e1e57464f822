"""From a recipe to a trained model, in runs that may be interrupted anywhere."""

from keras_vit.training.checkpoints import FOLDER as CHECKPOINTS
from keras_vit.training.checkpoints import OtherVariables
from keras_vit.training.fitting import build_model, compile_model, fit
from keras_vit.training.flops import operations
from keras_vit.training.journal import (
    BEST_MODEL,
    HISTORY,
    TIMING,
    Diverged,
    Interrupted,
    OtherData,
    read_history,
)
from keras_vit.training.optimizers import Muon
from keras_vit.training.schedules import step_schedule

__all__ = [
    "BEST_MODEL",
    "CHECKPOINTS",
    "HISTORY",
    "TIMING",
    "Diverged",
    "Interrupted",
    "Muon",
    "OtherData",
    "OtherVariables",
    "build_model",
    "compile_model",
    "fit",
    "operations",
    "read_history",
    "step_schedule",
]
