"""Exporting trained models to other runtimes, and comparing their outputs with those of Keras."""

import json
import math
import typing
import zipfile

import keras
import numpy as np

from keras_vit.layers import gelu
from keras_vit.model import check_is_vision_transformer, layers_in_inference
from keras_vit.prediction import predict
from keras_vit.transfer import adapted

# Name of the output of an exported model, and of the file with its metadata.
OUTPUT, METADATA = "probabilities", "metadata.json"


class Format(typing.NamedTuple):
    """An export format of `write`.

    Attributes:
        keras_name: string, its name in `keras.Model.export`.
        suffix: string, suffix of its files; empty if it is a folder.
        packages: names of the modules that it needs besides TensorFlow.
    """

    keras_name: str
    suffix: str
    packages: tuple[str, ...]


FORMATS = {
    "onnx": Format("onnx", ".onnx", ("onnx", "tf2onnx", "onnxruntime")),
    "saved_model": Format("tf_saved_model", "", ()),
    "litert": Format("litert", ".tflite", ("ai_edge_litert",)),
}


def served(model):
    """The inference-only model in float32: raw pixels in, probabilities out.

    Layers of its augmentation that change nothing in inference are left out.

    Args:
        model: a trained `VisionTransformer`.

    Returns:
        A `keras.Model` from float32 `(B, H, W, C)`, 0 to 255, to `(B, num_classes)`; each row
        sums to one.
    """
    check_is_vision_transformer(model)
    bare = adapted(model, augmentation=layers_in_inference(model), dtype="float32")
    for layer in bare.layers:
        if getattr(layer, "activation", None) is gelu:
            layer.activation = _gelu_by_erf
    return keras.Model(bare.input, keras.layers.Softmax(dtype="float32")(bare.output))


def _gelu_by_erf(x):
    """`gelu` in operations that ONNX supports; TensorFlow's own uses `erfc`."""
    return 0.5 * x * (1 + keras.ops.erf(x / math.sqrt(2)))


def write(model, path, format):
    """Exports a model with `keras.Model.export`, from `images` to `probabilities`.

    Args:
        model: a model from `served`.
        path: `Path` of the file, or of the folder for `"saved_model"`.
        format: string, `"onnx"`, `"saved_model"` or `"litert"`.
    """
    shape = (None, *model.input_shape[1:])
    signature = [keras.layers.InputSpec(shape=shape, dtype="float32", name="images")]
    settings = {} if format == "litert" else {"verbose": False}
    keras.Model(model.input, {OUTPUT: model.output}).export(
        str(path), format=FORMATS[format].keras_name, input_signature=signature, **settings
    )


def metadata(model):
    """What the users of an exported model must know, as a dictionary for JSON.

    Args:
        model: the trained `VisionTransformer`.
    """
    height, width, channels = model.input_shape[1:]
    normalization = model.get_layer("normalization")
    mean, scale = (
        [float(x) for x in keras.ops.convert_to_numpy(values).ravel()]
        for values in (normalization.mean, normalization.scale)
    )
    return {
        "class_names": model.class_names and list(model.class_names),
        "input": {
            "name": "images",
            "layout": "batch, height, width, channels",
            "height": height,
            "width": width,
            "channels": channels,
            "values": "float32 from 0 to 255",
        },
        "resizing": {
            "aspect_ratio": model.resize,
            "interpolation": "bilinear, antialiased",
        },
        "normalization": {
            "place": "inside the model: do not normalize the images",
            "mean": mean,
            "standard_deviation": scale,
        },
        "output": {"name": OUTPUT, "values": "one probability per class, in their order"},
    }


def add_metadata(path, format, content):
    """Writes metadata into an exported model, where its runtime does not mind them.

    They are in `metadata_props` of ONNX, in `assets.extra/metadata.json` of a SavedModel, and in a
    ZIP archive at the end of a LiteRT file, as its associated files are (`unzip -p FILE`).

    Args:
        path: `Path` of the file or folder that `write` wrote.
        format: string, one of `FORMATS`.
        content: dictionary for JSON.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False)
    if format == "onnx":
        import onnx

        exported = onnx.load(path)
        onnx.helper.set_model_props(
            exported, {name: json.dumps(x, ensure_ascii=False) for name, x in content.items()}
        )
        onnx.save(exported, path)
    elif format == "saved_model":
        (path / "assets.extra").mkdir(exist_ok=True)
        (path / "assets.extra" / METADATA).write_text(text, encoding="utf-8")
    else:
        with zipfile.ZipFile(path, "a") as archive:
            archive.writestr(METADATA, text)


def runner(path, format):
    """An exported model in its own runtime, as a function from images to probabilities."""
    return {"onnx": _onnx, "saved_model": _saved_model, "litert": _litert}[format](path)


def compare(model, run, images):
    """The largest difference between the probabilities of an exported model and those of Keras.

    Args:
        model: the trained `VisionTransformer`.
        run: function from `runner`.
        images: array `(B, H, W, C)`. The exported model runs on all of them at once, and on the
            first eight one by one.

    Returns:
        Float; NaN if any probability is NaN.
    """
    images = np.asarray(images, "float32")
    reference = predict(model, images)
    alone = np.concatenate([run(image[None]) for image in images[:8]])
    differences = run(images) - reference, alone - reference[: len(alone)]
    return float(np.max([np.abs(x).max() for x in differences]))


def _onnx(path):
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda images: session.run([OUTPUT], {"images": images})[0]


def _saved_model(path):
    import tensorflow as tf

    loaded = tf.saved_model.load(str(path))  # Keeps the variables of its functions alive.
    return lambda images: loaded.serve(images)[OUTPUT].numpy()


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
