"""Base class of the image layers: `tf.data` on any backend, and rounding to integers."""

import sys

import keras
import numpy as np
from keras.src.layers.preprocessing.data_layer import DataLayer


class PipelineLayer(DataLayer):
    """A layer that computes with `self.backend`, which is TensorFlow inside `tf.data`.

    Keras's own base class casts whatever enters a TensorFlow graph to the
    layer's dtype, including masks and labels. Here, `call` gets its inputs as
    they are, so that results are the same inside and outside a graph.
    """

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self._convert_input_args = False

    def __call__(self, inputs, **kwargs):
        tf = sys.modules.get("tensorflow")
        if tf is None or not any(map(tf.is_symbolic_tensor, keras.tree.flatten(inputs))):
            return super().__call__(inputs, **kwargs)
        self.backend.set_backend("tensorflow")
        try:
            return keras.layers.Layer.__call__(self, inputs, **kwargs)
        finally:
            self.backend.reset()

    def _to_compute_dtype(self, x):
        """Casts a tensor to the layer's dtype; for an integer dtype, rounds and clips it first."""
        if "int" in self.compute_dtype:
            limits = np.iinfo(self.compute_dtype)
            x = self.backend.cast(x, "float32")
            x = self.backend.numpy.clip(self.backend.numpy.round(x), limits.min, limits.max)
        return self.backend.cast(x, self.compute_dtype)
