"""`evaluate`: the metrics of a saved model on images that it has not seen."""

import math

import keras

from keras_vit.data import DatasetError, is_folder, load_unseen
from keras_vit.files import write_json
from keras_vit.reporting import figures, metrics
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import check_suits, load_model, load_suitable
from keras_vit_cli.run_directory import RunDirectory


def run(options):
    """Prints the metrics of a saved model, and draws pictures; returns the exit status."""
    if options.output and RunDirectory(options.output).config.exists():
        raise CommandError(f"{options.output} holds a run, whose metrics would be lost")
    model = load_model(options.model)
    dataset, left_out = unseen_by(model, options)
    probabilities, measured = measure(model, dataset)
    if not options.output:
        show(measured, dataset)
    else:
        with explaining_failed_writes(options.output):
            options.output.mkdir(parents=True, exist_ok=True)
            facts = {"dataset": dataset.name, "model": options.model.name, "left_out": left_out}
            write_json(RunDirectory(options.output).metrics, {**facts, **measured})
            show(measured, dataset)
            figures.draw_all(model, dataset, probabilities, options.output)
            print(f"Metrics and pictures: {options.output}.")
    return 0


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
    if not is_folder(options.dataset):
        return load_suitable(model, options.model, options.dataset, options.data_dir), {}
    try:
        dataset, left_out = load_unseen(
            options.dataset, model.input_shape[1:3], model.class_names, frozenset(model.seen)
        )
    except DatasetError as error:
        raise CommandError(str(error)) from error
    check_suits(model, options.model, dataset)
    count = len(dataset.test_labels)
    total = count + sum(left_out.values())
    reasons = ", ".join(f"{count} {reason}" for reason, count in left_out.items())
    print(
        f"Measured on {count:,} of {total:,} images in {options.dataset}, without {reasons}"
        if left_out
        else f"Measured on all {count:,} images in {options.dataset}"
    )
    return dataset, left_out
