"""The augmentation layers, beside what else does the same to a batch.

`python -m benchmarks.augmentation` measures `RandomResizedCrop` on a batch of 128 images of 32x32
and on one of 64 of 224x224, and `TrivialAugment` on the former, each contestant compiled by
`tf.function` (PyTorch eager) in a process of its own, in turns. Prints a table and writes it, with
a picture, to `benchmarks/results/`.
"""

import argparse
import statistics

import numpy as np

from benchmarks import side_by_side

SIZES = {32: 128, 224: 64}
SCALE, RATIO = (0.8, 1.0), (0.9, 1.1)


def images_of(side):
    shape = SIZES[side], side, side, 3
    return np.random.default_rng(0).integers(0, 256, shape).astype("float32")


def compiled(side, layer):
    """A function that runs a layer on a batch as a training graph would."""
    import tensorflow as tf

    images = tf.constant(images_of(side))
    call = tf.function(lambda x: layer(x, training=True))
    return lambda: call(images)[0, 0, 0, 0].numpy()


def ours(side):
    from keras_vit import RandomResizedCrop

    return compiled(side, RandomResizedCrop(side, side, SCALE, RATIO))


def keras_aug(side):
    from keras_aug import layers

    return compiled(side, layers.vision.RandomResizedCrop(side, SCALE, RATIO))


def random_zoom(side):
    import keras

    return compiled(side, keras.layers.RandomZoom((-0.2, 0.0)))


def random_crop_and_resizing(side):
    """Keras's crop takes one box for the whole batch, so that it does less."""
    import keras

    small = round(side * 0.9)
    layers = [keras.layers.RandomCrop(small, small), keras.layers.Resizing(side, side)]
    return compiled(side, lambda x, training: layers[1](layers[0](x, training=training)))


def crop_and_resize(side):
    """`tf.image.crop_and_resize` with a square box of its own for each image."""
    import tensorflow as tf

    count = SIZES[side]

    def crop(images, training):
        length = tf.sqrt(tf.random.uniform([count], *SCALE))
        top, left = (tf.random.uniform([count]) * (1 - length) for _ in range(2))
        boxes = tf.stack([top, left, top + length, left + length], axis=1)
        return tf.image.crop_and_resize(images, boxes, tf.range(count), [side, side])

    return compiled(side, crop)


def pytorch(side):
    """A crop and an antialiased interpolation, image by image."""
    import torch
    from torch.nn import functional

    images = torch.from_numpy(images_of(side)).permute(0, 3, 1, 2).contiguous()
    random = np.random.default_rng(0)

    def step():
        crops = []
        for image in images:
            length = round(side * random.uniform(*SCALE) ** 0.5)
            top, left = random.integers(0, side - length + 1, 2)
            crop = image[None, :, top : top + length, left : left + length]
            options = {"mode": "bilinear", "antialias": True}
            crops.append(functional.interpolate(crop, (side, side), **options))
        return torch.cat(crops)

    return step


def trivial_augment(side):
    from keras_vit import TrivialAugment

    return compiled(side, TrivialAugment())


def rand_augment(side):
    """Keras distorts a whole batch in the same two ways, so that it does less."""
    import keras

    return compiled(side, keras.layers.RandAugment())


CROPS = {
    "ours": ours,
    "keras-aug": keras_aug,
    "stock RandomZoom": random_zoom,
    "stock RandomCrop + Resizing (one box)": random_crop_and_resizing,
    "tf.image.crop_and_resize": crop_and_resize,
    "PyTorch, image by image": pytorch,
}
DISTORTIONS = {"ours": trivial_augment, "stock RandAugment (one kind for all)": rand_augment}
GROUPS = {
    "128 images of 32x32, cropped": (32, CROPS),
    "64 images of 224x224, cropped": (224, CROPS),
    "128 images of 32x32, distorted": (32, DISTORTIONS),
}
NEEDS = {"keras-aug": "keras-aug", "PyTorch, image by image": "torch"}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30, help="steps of each contestant")
    options = parser.parse_args()
    if options.rounds < 2:
        parser.error("--rounds must be at least 2")
    rows, measured = [], {}
    on_tensorflow = {"KERAS_BACKEND": "tensorflow", **side_by_side.TUNED}
    for title, (side, contestants) in GROUPS.items():
        entries = {
            name: (make, (side,), on_tensorflow)
            for name, make in contestants.items()
            if name not in NEEDS or side_by_side.version(NEEDS[name])
        }
        measured[title] = side_by_side.measure(entries, options.rounds)
        rows += [title, *table(measured[title]), ""]
    print("\n".join(rows))
    packages = ("keras", "tensorflow", "torch", "keras-aug")
    content = {
        "command": side_by_side.command("benchmarks.augmentation"),
        **side_by_side.machine(),
        "packages": {name: side_by_side.version(name) for name in packages},
        "contestants": measured,
        "table": rows,
    }
    path = side_by_side.write("augmentation", content)
    draw(measured, path.with_suffix(".png"))
    print(f"Written to {path} and {path.with_suffix('.png')}")


def table(results):
    """Lines of text: time, memory that the steps added, and ours against each."""
    rows = [f"{'contestant':38} {'ms':>8} {'MiB':>6}  ours is faster by"]
    for name, result in results.items():
        if "error" in result:
            rows.append(f"{name:38} {result['error']}")
            continue
        times = side_by_side.ratio(results, "ours", name)
        low, high = times["quartiles"]
        milliseconds = 1e3 * statistics.median(result["seconds"])
        rows.append(
            f"{name:38} {milliseconds:8.2f} {result['added_mib']:6.0f}  "
            f"{times['median']:.1f} ({low:.1f} to {high:.1f})"
        )
    return rows


def draw(measured, path):
    """Draws the milliseconds of each contestant as bars, one panel for each size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(measured), figsize=(16, 3), layout="constrained")
    for axes, (title, results) in zip(panels, measured.items()):
        times = {
            name: 1e3 * statistics.median(result["seconds"])
            for name, result in results.items()
            if "error" not in result
        }
        names = sorted(times, key=times.get, reverse=True)
        colors = ["tab:orange" if name == "ours" else "tab:gray" for name in names]
        bars = axes.barh(names, [times[name] for name in names], color=colors)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.margins(x=0.15)
        axes.set(xlabel="milliseconds")
        axes.set_title(title, loc="right")
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
