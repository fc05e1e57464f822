"""Accuracy of a finished run's model on test images that are noisy, blurred, pale or compressed.

`python -m benchmarks.corruptions RUN` reads the model and the data set of a run folder, prints a
table and writes it as `corruptions.json` beside them. Kinds and severities are four of those of
CIFAR-10-C (Hendrycks & Dietterich, 2019, arXiv:1903.12261).
"""

import argparse
import io
import json
import pathlib

import numpy as np
from PIL import Image
from scipy import ndimage

from keras_vit.files import write_json


def noisy(images, deviation):
    """Adds normal noise; its standard deviation is a fraction of the range of pixels."""
    noise = np.random.default_rng(0).normal(scale=255 * deviation, size=images.shape)
    return pixels(images + noise)


def blurred(images, radius):
    """Convolves rows and columns with a normal distribution of a standard deviation in pixels."""
    return pixels(ndimage.gaussian_filter(images.astype("float32"), (0, radius, radius, 0)))


def pale(images, fraction):
    """Leaves a fraction of each pixel's distance to the mean of its image and channel."""
    mean = images.mean(axis=(1, 2), keepdims=True)
    return pixels(mean + fraction * (images - mean))


def compressed(images, quality):
    """Encodes each image as a JPEG of a quality from 1 to 95, and decodes it."""
    return np.stack([_through_jpeg(image, quality) for image in images])


def pixels(values):
    return np.clip(np.round(values), 0, 255).astype("uint8")


def _through_jpeg(image, quality):
    file = io.BytesIO()
    Image.fromarray(image.squeeze()).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file)).reshape(image.shape)


# By name: a function and its setting at severities 1 to 5.
CORRUPTIONS = {
    "noise": (noisy, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "blur": (blurred, (0.4, 0.6, 0.7, 0.8, 1.0)),
    "contrast": (pale, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "JPEG": (compressed, (80, 65, 58, 50, 40)),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=pathlib.Path, help="folder of a finished run")
    options = parser.parse_args()
    from keras_vit import predict
    from keras_vit_cli.errors import CommandError
    from keras_vit_cli.inputs import load_model, load_suitable

    try:
        config = json.loads((options.run / "config.json").read_text(encoding="utf-8"))
        path = options.run / "model.keras"
        model = load_model(path)
        dataset = load_suitable(model, path, config["dataset"], config.get("data_dir"))
        dataset = dataset.without(model.seen)
    except (OSError, ValueError, KeyError, TypeError, CommandError) as error:
        parser.error(f"{options.run} is not the folder of a finished run: {error}")

    images, labels = dataset.test_images[:], dataset.test_labels

    def accuracy(images):
        return float((predict(model, images).argmax(axis=1) == labels).mean())

    found = {"clean": accuracy(images)}
    print(
        f"clean     {found['clean']:7.2%}\nseverity       1       2       3       4       5    mean"
    )
    for name, (corrupt, settings) in CORRUPTIONS.items():
        found[name] = [accuracy(corrupt(images, setting)) for setting in settings]
        shown = "".join(f" {value:7.2%}" for value in (*found[name], np.mean(found[name])))
        print(f"{name:9}{shown}", flush=True)
    found["mean"] = float(np.mean([found[name] for name in CORRUPTIONS]))
    print(f"mean of all {found['mean']:.2%}")
    path = options.run / "corruptions.json"
    write_json(path, found)
    print(f"Written to {path}")


if __name__ == "__main__":
    main()
