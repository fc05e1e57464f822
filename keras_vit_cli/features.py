"""`features`: what the head of a model reads of images, one row each."""

import numpy as np

from keras_vit.files import atomic_write
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import image_batches, load_model


def run(options):
    """Writes the features of images to an `.npz` file; returns 1 if some could not be read."""
    if options.output.suffix != ".npz":
        raise CommandError(f"--output must end in .npz, but is {options.output}")
    model = load_model(options.model)
    names, failed = [], 0
    features = [model.features(np.empty((0, *model.input_shape[1:])))]
    for paths, images, some_failed in image_batches(options.images, model):
        failed |= some_failed
        if paths:
            names += paths
            features.append(model.features(images))
    table = np.concatenate(features)
    with explaining_failed_writes(options.output):
        options.output.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(options.output) as part:
            np.savez(part, images=np.array(names, str), features=table)
    print(f"{options.output}: features {table.shape}, and the names of their images.")
    return int(failed)
