"""Layers that Keras lacks and the Vision Transformer needs."""

from keras_vit.layers.patches import Patches
from keras_vit.layers.random_resized_crop import RandomResizedCrop
from keras_vit.layers.tokens import ClassToken, PositionEmbedding

__all__ = ["ClassToken", "Patches", "PositionEmbedding", "RandomResizedCrop"]
