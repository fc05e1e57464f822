"""Layers that Keras lacks, and faster versions of Keras layers under the same names."""

from keras_vit.layers.activations import gelu
from keras_vit.layers.attention import MultiHeadAttention
from keras_vit.layers.dropout import Dropout
from keras_vit.layers.mix import MixUpCutMix
from keras_vit.layers.normalization import LayerNormalization, Normalization
from keras_vit.layers.patches import Patches
from keras_vit.layers.random_resized_crop import RandomResizedCrop
from keras_vit.layers.tokens import ClassToken, FirstToken, PositionEmbedding
from keras_vit.layers.trivial_augment import TrivialAugment

__all__ = [
    "ClassToken",
    "Dropout",
    "FirstToken",
    "LayerNormalization",
    "MixUpCutMix",
    "MultiHeadAttention",
    "Normalization",
    "Patches",
    "PositionEmbedding",
    "RandomResizedCrop",
    "TrivialAugment",
    "gelu",
]
