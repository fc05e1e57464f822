"""`evaluate`: the metrics of a saved model on images that it has not seen."""

import csv
import math

import keras

from keras_vit.data import is_folder
from keras_vit.data.folders import TEST
from keras_vit.files import atomic_write, make_output, write_json
from keras_vit.reporting import figures, metrics
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import load_for_test, load_model
from keras_vit_cli.run_directory import RunDirectory, check_apart


def run(options):
    """Prints the metrics of a saved model, and draws pictures; returns the exit status."""
    if options.output and RunDirectory(options.output).config.exists():
        raise CommandError(f"{options.output} holds a run, whose metrics would be lost")
    if options.output:
        check_apart(options.output, options.dataset, "--output")
    model = load_model(options.model)
    dataset, left_out = unseen_by(model, options)
    probabilities, measured = measure(model, dataset)
    if not options.output:
        show(measured, dataset)
    else:
        with explaining_failed_writes(options.output):
            make_output(options.output)
            facts = {"dataset": dataset.name, "model": options.model.name, "left_out": left_out}
            write_json(RunDirectory(options.output).metrics, {**facts, **measured})
            write_predictions(RunDirectory(options.output).predictions, dataset, probabilities)
            show(measured, dataset)
            figures.draw_all(model, dataset, probabilities, options.output)
            print(f"Metrics, predictions and pictures: {options.output}.")
    return 0


def write_predictions(path, dataset, probabilities):
    """Writes a CSV file with a row for each test image: true and predicted class, probabilities.

    Args:
        path: `Path` of the file.
        dataset: a `Dataset`; images are named by their path in its folder, else by their index.
        probabilities: array `(N, num_classes)`.
    """
    names, images = dataset.class_names, range(len(probabilities))
    if dataset.manifest is not None:
        images = [file.path for file in dataset.manifest if file.split == TEST]
    predicted = probabilities.argmax(axis=1)
    with (
        atomic_write(path) as part,
        # The names of files are arbitrary bytes.
        open(part, "w", encoding="utf-8", errors="surrogateescape", newline="") as lines,
    ):
        writer = csv.writer(lines, lineterminator="\n")
        columns = (f"probability_{name}" for name in names)
        writer.writerow(("image", "true_class", "predicted_class", *columns))
        for image, label, guess, row in zip(images, dataset.test_labels, predicted, probabilities):
            writer.writerow((image, names[label], names[guess], *row.tolist()))


def measure(model, dataset, history=None):
    """Measures a trained model on the test images.

    Args:
        model: a `VisionTransformer`.
        dataset: a `Dataset`.
        history: what `fit` returned; None where it is not known.

    Returns:
        Class probabilities `(N, num_classes)`, and a dictionary of metrics.
    """
    probabilities = metrics.predict(model, dataset.test_images)
    labels, names = dataset.test_labels, dataset.class_names
    measured = {
        **metrics.classification_metrics(probabilities, labels, names),
        "parameters": sum(math.prod(weight.shape) for weight in model.trainable_weights),
        **(metrics.training_metrics(history, len(dataset.train_images)) if history else {}),
        **metrics.environment(),
    }
    if any(isinstance(layer, keras.layers.RandomFlip) for layer in model.augmentation):
        measured["flip_averaged_accuracy"] = metrics.flip_averaged_accuracy(
            model, dataset.test_images, labels, probabilities
        )
    return probabilities, measured


def show(measured, dataset):
    """Prints what `measure` returned for a data set."""
    print(metrics.per_class_table(measured))
    print(
        f"Test accuracy {measured['accuracy']:.2%}, loss {measured['loss']:.4f}, calibration error "
        f"{measured['calibration_error']:.2%} on {len(dataset.test_labels):,} images of "
        f"{dataset.name}"
    )


def unseen_by(model, options):
    """What a model is measured on, and how many images of a folder are left out for which reason.

    Of a folder, that is every image that the model was neither trained nor validated on.
    """
    source = options.dataset
    dataset, left_out = load_for_test(model, options.model, source, options.data_dir, model.seen)
    count = len(dataset.test_labels)
    total = count + sum(left_out.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    if left_out:
        print(f"Measured on {count:,} of {total:,} images in {source}, without {reasons}")
    elif is_folder(source):
        print(f"Measured on all {count:,} images in {source}")
    return dataset, left_out
