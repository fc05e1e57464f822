"""How long a training step takes, with and without augmentation.

`python -m benchmarks.train_step` measures on Keras's backend (`KERAS_BACKEND`), the contestants
interleaved, and prints medians and ratios.
"""

import argparse
import statistics
import time

import keras
import numpy as np

from keras_vit import VisionTransformer
from keras_vit.recipes import Baseline
from keras_vit.training import compile_model


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=128, help="images in a step")
    parser.add_argument("--rounds", type=int, default=20, help="steps of each contestant")
    options = parser.parse_args()

    random = np.random.default_rng(0)
    images = random.integers(0, 256, (options.batch_size, 32, 32, 3), dtype="uint8")
    labels = random.integers(0, 10, options.batch_size)
    contestants = {"augmentation": None, "no augmentation": []}
    models = {name: _compiled(layers) for name, layers in contestants.items()}
    seconds = {name: [] for name in models}
    for round_number in range(options.rounds + 3):
        for name, model in models.items():
            start = time.perf_counter()
            model.train_on_batch(images, labels)
            if round_number >= 3:  # The first rounds compile and warm up.
                seconds[name].append(time.perf_counter() - start)

    print(f"{keras.backend.backend()}, batch {options.batch_size}, {options.rounds} rounds")
    print(f"{'contestant':16}  ms per step  quartiles      images/s")
    for name, times in seconds.items():
        low, middle, high = statistics.quantiles(times, n=4)
        speed = options.batch_size / middle
        print(
            f"{name:16}  {1e3 * middle:11.1f}  {1e3 * low:.0f} to {1e3 * high:.0f}  {speed:10.1f}"
        )
    ratios = [a / b for a, b in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    print(
        f"augmentation: {middle - 1:+.1%} of a step (quartiles {low - 1:+.1%} to {high - 1:+.1%})"
    )


def _compiled(augmentation):
    keras.utils.set_random_seed(0)
    model = VisionTransformer(augmentation=augmentation)
    compile_model(model, Baseline())
    return model


if __name__ == "__main__":
    main()
