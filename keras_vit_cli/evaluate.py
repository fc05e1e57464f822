"""`evaluate`: the metrics of a saved model on images that it has not seen."""

import csv
import math

import keras

from keras_vit.data import is_folder
from keras_vit.data.folders import TEST
from keras_vit.files import atomic_write, make_output, write_json
from keras_vit.messages import warn
from keras_vit.prediction import predict
from keras_vit.reporting import figures, metrics
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import load_for_test, load_model, load_resized
from keras_vit_cli.run_directory import RunDirectory, check_apart


def run(options):
    """Prints the metrics of a saved model, and draws pictures; returns the exit status."""
    if options.output and RunDirectory(options.output).config.exists():
        raise CommandError(f"{options.output} holds a run, whose metrics would be lost")
    if options.output:
        check_apart(options.output, options.dataset, "--output")
    model = load_model(options.model)
    probed = load_to_probe(model, options) if options.probe else None
    facts, measured, probabilities = {"model": options.model.name}, {}, None
    try:
        dataset, facts["left_out"] = unseen_by(model, options)
        probabilities, measured = measure(model, dataset)
    except CommandError as error:
        if probed is None:
            raise
        dataset = probed
        warn(f"only the features are measured: {error}")
    if probed is not None:
        measured["probe"] = metrics.probe(model, probed)
    if not options.output:
        show(measured, dataset)
        return 0
    with explaining_failed_writes(options.output):
        make_output(options.output)
        facts["dataset"] = dataset.name
        write_json(RunDirectory(options.output).metrics, {**facts, **measured})
        if probabilities is not None:
            write_predictions(RunDirectory(options.output).predictions, dataset, probabilities)
        show(measured, dataset)
        if probabilities is not None:
            figures.draw_all(model, dataset, probabilities, options.output)
        written = "Metrics" if probabilities is None else "Metrics, predictions and pictures"
        print(f"{written}: {options.output}.")
    return 0


def write_predictions(path, dataset, probabilities):
    """Writes a CSV file with a row for each test image: true and predicted class, probabilities.

    Args:
        path: `Path` of the file.
        dataset: a `Dataset`; images are named by their path in its folder, else by their index
            in its source.
        probabilities: array `(N, num_classes)`.
    """
    names, images = dataset.class_names, dataset.test_indices
    if dataset.manifest is not None:
        images = [file.path for file in dataset.manifest if file.split == TEST]
    elif images is None:
        images = range(len(probabilities))
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
    probabilities = predict(model, dataset.test_images)
    labels, names = dataset.test_labels, dataset.class_names
    measured = {
        **metrics.classification_metrics(probabilities, labels, names),
        "parameters": sum(math.prod(weight.shape) for weight in parameters(model)),
        **(metrics.training_metrics(history, len(dataset.train_images)) if history else {}),
        **metrics.environment(),
    }
    if any(isinstance(layer, keras.layers.RandomFlip) for layer in model.augmentation):
        measured["flip_averaged_accuracy"] = metrics.flip_averaged_accuracy(
            model, dataset.test_images, labels, probabilities
        )
    return probabilities, measured


def show(measured, dataset):
    """Prints what `measure` returned for a data set, and `metrics.probe` if it is there."""
    if "accuracy" in measured:
        print(metrics.per_class_table(measured))
        print(
            f"Test accuracy {measured['accuracy']:.2%}, loss {measured['loss']:.4f}, calibration "
            f"error {measured['calibration_error']:.2%} on {len(dataset.test_labels):,} images of "
            f"{dataset.name}"
        )
    if probe := measured.get("probe"):
        print(
            f"On the features of {probe['train_images']:,} training images, a linear probe has "
            f"accuracy {probe['linear']:.2%} and {probe['neighbours']} nearest neighbours "
            f"{probe['nearest_neighbours']:.2%} on {probe['test_images']:,} test images"
        )


def parameters(model):
    """The weights that training changes, frozen ones included."""
    others = [model.get_layer("normalization"), *model.augmentation]
    return [weight for layer in model.layers if layer not in others for weight in layer.weights]


def load_to_probe(model, options):
    """The `Dataset` of any classes whose training and test images the features are probed on."""
    try:
        dataset = load_resized(model, options.model, options.dataset, options.data_dir)
    except CommandError as error:
        raise CommandError(f"--probe needs training and test images, but {error}") from error
    dataset = dataset.without(model.seen)
    if not len(dataset.test_labels):
        raise CommandError(
            f"--probe needs test images that the model was not trained on: {dataset.name} has none"
        )
    return dataset


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
