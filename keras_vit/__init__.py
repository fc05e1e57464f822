"""Vision Transformers for small images, trained from scratch in Keras 3."""

__version__ = "0.1.0"

from keras_vit.attention import (
    attention_distance,
    attention_gradients,
    attention_relevance,
    attention_rollout,
    attention_scores,
    patch_weights,
)
from keras_vit.data import load_dataset, read_image
from keras_vit.embeddings import patch_filters, position_similarity
from keras_vit.layers import MixUpCutMix, Patches, RandomResizedCrop, TrivialAugment
from keras_vit.loading import load_model
from keras_vit.losses import LabelSmoothingCrossentropy
from keras_vit.model import VisionTransformer
from keras_vit.prediction import predict
from keras_vit.presets import list_presets
from keras_vit.training import Muon

__all__ = [
    "LabelSmoothingCrossentropy",
    "MixUpCutMix",
    "Muon",
    "Patches",
    "RandomResizedCrop",
    "TrivialAugment",
    "VisionTransformer",
    "attention_distance",
    "attention_gradients",
    "attention_relevance",
    "attention_rollout",
    "attention_scores",
    "load_dataset",
    "load_model",
    "patch_filters",
    "patch_weights",
    "list_presets",
    "position_similarity",
    "predict",
    "read_image",
]
