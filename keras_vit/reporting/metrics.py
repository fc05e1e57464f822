"""Metrics of a trained model: accuracy, calibration, training speed, and the environment."""

import importlib.metadata
import os
import platform
import statistics

import keras
import numpy as np
from sklearn import metrics

from keras_vit.devices import accelerators
from keras_vit.prediction import batch_size, predict

# DINO's neighbours of an image, and the temperature of their votes.
NEIGHBOURS, TEMPERATURE = 20, 0.07


def flip_averaged_accuracy(model, images, labels, probabilities):
    """Accuracy of predictions averaged over each image and its horizontal flip.

    Args:
        model: a `VisionTransformer`.
        images: array `(N, H, W, C)`.
        labels: integer array `(N,)`.
        probabilities: array `(N, num_classes)`, predicted for the unflipped images.

    Returns:
        Float in [0, 1].
    """
    size = batch_size(model)
    batches = (images[start : start + size] for start in range(0, len(images), size))
    flipped = np.concatenate([predict(model, batch[:, :, ::-1]) for batch in batches])
    return float(np.mean((probabilities + flipped).argmax(axis=1) == labels))


def classification_metrics(probabilities, labels, class_names):
    """Accuracy, loss and calibration error, and the metrics of each class.

    Args:
        probabilities: array `(N, num_classes)`, rows sum to one.
        labels: integer array `(N,)`.
        class_names: list of strings.

    Returns:
        Dictionary with `accuracy`, `loss` (cross-entropy in nats), `calibration_error`, and
        `per_class`: by class name, `precision`, `recall`, `f1_score` and the number of `images`.
    """
    classes = range(len(class_names))
    predicted = probabilities.argmax(axis=1)
    columns = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    rows = zip(class_names, *columns)
    return {
        "accuracy": float(metrics.accuracy_score(labels, predicted)),
        "loss": float(metrics.log_loss(labels, probabilities, labels=classes)),
        "calibration_error": calibration_error(probabilities, labels),
        "per_class": {
            name: {
                "precision": float(precision),
                "recall": float(recall),
                "f1_score": float(f1_score),
                "images": int(images),
            }
            for name, precision, recall, f1_score, images in rows
        },
    }


def probe(model, dataset):
    """How well simple classifiers tell classes apart by what the head of a model reads.

    Both are trained on the features of the training images and measured on those of the test
    images, whose classes need not be the model's: a linear classifier (Alain & Bengio, 2016), and
    the nearest neighbours by cosine similarity, which vote as in DINO (Caron et al., 2021).

    Args:
        model: a `VisionTransformer`.
        dataset: a `Dataset`.

    Returns:
        Dictionary with `linear` and `nearest_neighbours`, accuracies in [0, 1]; and how many of the
        `train_images` were `neighbours`, and how many `test_images` there were.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.neighbors import KNeighborsClassifier
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    trained, tested = (
        (model.features(images), labels)
        for images, labels in (
            (dataset.train_images, dataset.train_labels),
            (dataset.test_images, dataset.test_labels),
        )
    )
    neighbours = min(NEIGHBOURS, len(trained[1]))
    linear = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000))
    nearest = KNeighborsClassifier(
        neighbours, weights=lambda x: np.exp(-x / TEMPERATURE), metric="cosine"
    )
    return {
        "linear": float(linear.fit(*trained).score(*tested)),
        "nearest_neighbours": float(nearest.fit(*trained).score(*tested)),
        "neighbours": neighbours,
        "train_images": len(trained[1]),
        "test_images": len(tested[1]),
    }


def calibration_error(probabilities, labels, bins=15):
    """Expected calibration error (Guo et al., 2017), the gap between confidence and accuracy.

    Images are sorted into bins of equal width by confidence, the probability of the predicted
    class. The gaps between mean confidence and accuracy are averaged over the bins, weighted by
    the number of images in each.

    Args:
        probabilities: array `(N, num_classes)`, rows sum to one.
        labels: integer array `(N,)`.
        bins: int, number of bins between 0 and 1.

    Returns:
        Float in [0, 1].
    """
    confidence = probabilities.max(axis=1)
    gaps = confidence - (probabilities.argmax(axis=1) == labels)
    bin_of = np.minimum((confidence * bins).astype(int), bins - 1)
    return float(np.abs(np.bincount(bin_of, weights=gaps)).sum() / len(labels))


def training_metrics(history, images):
    """Duration and speed of training, from the history of `fit` and the number of images."""
    seconds = history["seconds"]
    typical_epoch = statistics.median(seconds[1:] or seconds)  # The first epoch compiles.
    return {
        "epochs": len(seconds),
        "training_seconds": round(sum(seconds), 1),
        "images_per_second": round(images / typical_epoch, 1),
    }


def environment():
    """The backend, the device, and the versions of Python and the packages used."""
    backend = keras.backend.backend()
    packages = ("keras", "numpy", *{backend, "tensorflow"})
    versions = {}
    for name in sorted(packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "backend": backend,
        "device": f"{(*accelerators(), 'cpu')[0]}, {_processor()}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), **versions},
    }


def per_class_table(results):
    """The metrics of each class, from `classification_metrics`, as a table in plain text."""
    width = max(len("class"), *map(len, results["per_class"]))
    lines = [f"{'class':{width}}  precision  recall      F1  images"]
    for name, row in results["per_class"].items():
        rates = f"{row['precision']:9.3f}  {row['recall']:6.3f}  {row['f1_score']:6.3f}"
        lines.append(f"{name:{width}}  {rates}  {row['images']:6d}")
    return "\n".join(lines)


def _processor():
    """The name of the processor, which `platform` does not report on Linux."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            return next(x.split(":")[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
