"""Trained models as files for other runtimes, and those runtimes run on them, to compare."""

import math
import statistics
import time

import keras
import numpy as np

from keras_vit.evaluation import predict
from keras_vit.layers import gelu

# What `Model.export` calls each format.
FORMATS = {"onnx": "onnx", "saved_model": "tf_saved_model", "litert": "litert"}
THROUGHPUT_BATCH = 256


def served(model):
    """The inference-only model: raw pixels in, probabilities out.

    Layers of its augmentation that change nothing in inference are left out.

    Args:
        model: a trained `VisionTransformer`.

    Returns:
        A `keras.Model` from float32 `(B, H, W, C)`, 0 to 255, to `(B, num_classes)`; each row
        sums to one.
    """
    varying = _varying(model)
    bare = type(model).from_config({**model.get_config(), "augmentation": varying})
    for layer in bare.layers:
        layer.set_weights(model.get_layer(layer.name).get_weights())
        if getattr(layer, "activation", None) is gelu:
            layer.activation = _gelu_by_erf
    return keras.Model(bare.input, keras.layers.Softmax(dtype="float32")(bare.output))


def _varying(model):
    """The layers of a model's augmentation that change images in inference, too."""
    noise = np.random.default_rng(0).uniform(0, 255, (4, *model.input_shape[1:]))
    noise[0], noise[1] = 0, 255
    images, kept = noise.astype("float32"), []
    for layer in model.augmentation:
        before = images
        images = keras.ops.convert_to_numpy(layer(before, training=False))
        if not np.array_equal(before, images):
            kept.append(layer)
    return kept


def _gelu_by_erf(x):
    """`gelu` out of functions that ONNX knows; TensorFlow's own is made of `erfc`."""
    return 0.5 * x * (1 + keras.ops.erf(x / math.sqrt(2)))


def write(model, path, format):
    """Writes a model by `keras.Model.export`.

    Args:
        model: a model from `served`.
        path: `Path` of the file, or of the folder for `"saved_model"`.
        format: `"onnx"`, `"saved_model"` or `"litert"`.
    """
    shape = (None, *model.input_shape[1:])
    signature = [keras.layers.InputSpec(shape=shape, dtype="float32", name="images")]
    settings = {} if format == "litert" else {"verbose": False}
    model.export(str(path), format=FORMATS[format], input_signature=signature, **settings)


def runner(path, format):
    """An exported file in its own runtime: a function from images to probabilities."""
    return {"onnx": _onnx, "saved_model": _saved_model, "litert": _litert}[format](path)


def compare(model, run, images):
    """How an exported model's answers and times differ from Keras's.

    Args:
        model: the trained `VisionTransformer`.
        run: function from `runner`.
        images: array `(B, H, W, C)`.

    Returns:
        Dictionary: `difference`, the largest between two probabilities, of images one by one and
        together; and for `keras` and `exported` milliseconds for one image and images per second
        in batches of 256, medians.
    """
    images = np.asarray(images, "float32")
    reference = predict(model, images)
    alone = np.concatenate([run(image[None]) for image in images[:8]])
    differences = run(images) - reference, alone - reference[: len(alone)]
    difference = np.max([np.abs(x).max() for x in differences])  # NaN if one is.
    one, many = images[:1], np.resize(images, (THROUGHPUT_BATCH, *images.shape[1:]))
    contestants = {"keras": model.predict_on_batch, "exported": run}
    times = {name: ([], []) for name in contestants}
    for turn in range(11):  # In turns, so that a drift of the machine meets both; one warms up.
        for name, function in contestants.items():
            for batch, seconds in zip((one, many), times[name]):
                if batch is many and turn > 3:
                    continue
                start = time.perf_counter()
                function(batch)
                if turn:
                    seconds.append(time.perf_counter() - start)
    return {
        "difference": float(difference),
        **{
            name: {
                "milliseconds": 1000 * statistics.median(alone),
                "images_per_second": THROUGHPUT_BATCH / statistics.median(together),
            }
            for name, (alone, together) in times.items()
        },
    }


def _onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (inputs,) = session.get_inputs()
    return lambda images: session.run(None, {inputs.name: images})[0]


def _saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))  # Owns the variables of its functions.
    return lambda images: loaded.serve(images).numpy()


def _litert(path):
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(model_path=str(path))
    interpreter.allocate_tensors()

    def run(images):
        (inputs,), (outputs,) = interpreter.get_input_details(), interpreter.get_output_details()
        if tuple(inputs["shape"]) != images.shape:
            interpreter.resize_tensor_input(inputs["index"], images.shape)
            interpreter.allocate_tensors()
        interpreter.set_tensor(inputs["index"], images)
        interpreter.invoke()
        return interpreter.get_tensor(outputs["index"])

    return run
