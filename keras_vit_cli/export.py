"""`export`: a model for another runtime, compared there with Keras."""

import numpy as np

from keras_vit.export import FORMATS, add_metadata, compare, metadata, runner, served, write
from keras_vit.files import make_output
from keras_vit_cli import backend
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import load_for_test, load_model

LARGEST_DIFFERENCE = 1e-3  # Between two probabilities, of Keras and of an exported model.


def run(options):
    """Writes a model for another runtime; returns the exit status."""
    if options.format not in FORMATS:
        raise CommandError(f"--format must be one of {', '.join(FORMATS)}, not {options.format}")
    output_format = FORMATS[options.format]
    if not options.output.name.endswith(output_format.suffix):
        raise CommandError(
            f"--output of --format {options.format} must end in {output_format.suffix}"
        )
    for package in output_format.packages:
        backend.require(package, f"--format {options.format}")
    model = load_model(options.model)
    images = np.random.default_rng(0).integers(0, 256, (256, *model.input_shape[1:]))
    source = "256 images of noise"
    if options.dataset:
        dataset, _ = load_for_test(model, options.model, options.dataset, options.data_dir)
        images = dataset.test_images[:256]
        source = f"{len(images)} test images of {options.dataset}"
    with backend.quiet():
        with explaining_failed_writes(options.output):
            if not options.output.parent.exists():
                make_output(options.output.parent)
            write(served(model), options.output, options.format)
            add_metadata(options.output, options.format, metadata(model))
        difference = compare(model, runner(options.output, options.format), images)
    print(
        f"{options.output}, {options.format}: largest difference of a probability on {source}: "
        f"{difference:.1e}"
    )
    if not difference <= LARGEST_DIFFERENCE:
        raise CommandError(
            f"{options.output} differs from Keras by more than {LARGEST_DIFFERENCE}", 1
        )
    return 0
