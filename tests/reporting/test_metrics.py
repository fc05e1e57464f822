import types

import keras
import numpy as np
import pytest

from keras_vit.data import Dataset
from keras_vit.reporting.metrics import (
    calibration_error,
    classification_metrics,
    environment,
    per_class_table,
    probe,
    training_metrics,
)

LABELS = np.array([0, 0, 1, 1])
PROBABILITIES = np.array([[0.9, 0.1], [0.2, 0.8], [0.3, 0.7], [0.4, 0.6]])


def test_metrics_agree_with_counting_by_hand():
    metrics = classification_metrics(PROBABILITIES, LABELS, ["cat", "dog"])
    assert metrics["accuracy"] == 0.75
    assert metrics["loss"] == pytest.approx(-np.mean(np.log([0.9, 0.2, 0.7, 0.6])))
    # Confidences 0.9 (right), 0.8 (wrong), 0.7 and 0.6 (right), each in a bin of its own
    assert metrics["calibration_error"] == pytest.approx((0.1 + 0.8 + 0.3 + 0.4) / 4)
    assert metrics["per_class"]["cat"] == {
        "precision": 1.0,
        "recall": 0.5,
        "f1_score": pytest.approx(2 / 3),
        "images": 2,
    }
    assert metrics["per_class"]["dog"]["precision"] == pytest.approx(2 / 3)


def test_probes_tell_classes_apart_by_the_features():
    """Two classes lie close together on either side of a line."""
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(60, 3)), np.arange(60) % 2
    features[:, 0] = np.where(labels == 1, 0.3, -0.3) + 0.1 * random.random(60)
    model = types.SimpleNamespace(features=lambda images: features[images])
    train, test = np.arange(40), np.arange(40, 60)
    found = probe(model, Dataset("", train, labels[:40], test, labels[40:], ["a", "b"], True))
    # The formula of DINO, beside scikit-learn.
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    similarity = unit[40:] @ unit[:40].T
    votes = np.zeros((20, 2))
    for row, near in enumerate(similarity.argsort(axis=1)[:, ::-1][:, :20]):
        for other in near:
            votes[row, labels[other]] += np.exp(similarity[row, other] / 0.07)
    assert found == {
        "linear": 1.0,
        "nearest_neighbours": (votes.argmax(axis=1) == labels[40:]).mean(),
        **{"neighbours": 20, "train_images": 40, "test_images": 20},
    }
    assert 0.5 < found["nearest_neighbours"] < 1


def test_classes_may_be_called_like_a_line_of_the_table():
    metrics = classification_metrics(PROBABILITIES, LABELS, ["accuracy", "macro avg"])
    assert metrics["per_class"]["accuracy"]["recall"] == 0.5
    assert metrics["per_class"]["macro avg"]["images"] == 2


def test_images_of_one_bin_are_averaged_before_they_count_as_error():
    probabilities = np.repeat([[0.75, 0.25]], 40, axis=0)
    labels = np.arange(40) % 4 == 0  # Three of four are right, as confident as they are right.
    assert calibration_error(probabilities, labels) == pytest.approx(0)
    assert calibration_error(probabilities, np.zeros(40, int)) == pytest.approx(0.25)
    assert calibration_error(np.array([[1.0, 0.0]]), np.array([1])) == 1


def test_the_table_has_a_line_for_each_class():
    lines = per_class_table(classification_metrics(PROBABILITIES, LABELS, ["cat", "dog"]))
    head, cat, dog = lines.splitlines()
    assert head.split() == ["class", "precision", "recall", "F1", "images"]
    assert cat.split() == ["cat", "1.000", "0.500", "0.667", "2"]
    assert dog.split()[0] == "dog"


def test_the_speed_leaves_out_the_epoch_that_compiles():
    metrics = training_metrics({"seconds": [30.0, 10.0, 12.0, 11.0]}, images=550)
    assert metrics == {"epochs": 4, "training_seconds": 63.0, "images_per_second": 50.0}
    assert training_metrics({"seconds": [10.0]}, images=50)["images_per_second"] == 5.0


def test_the_environment_names_backend_device_and_versions():
    found = environment()
    assert found["backend"] == keras.backend.backend()
    assert found["versions"]["keras"] == keras.__version__
    assert found["versions"]["numpy"] == np.__version__
    assert "cores" in found["device"]
