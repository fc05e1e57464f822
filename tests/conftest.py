"""Where the tests find CIFAR-10: in `TFDS_DATA_DIR`, else prepared beside this repository."""

import os
import pathlib

import keras
import numpy as np
import pytest
from PIL import Image

from keras_vit import load_dataset
from keras_vit_cli import main

TINY = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=2", "--batch-size=8"]
CLASSES = {"$_$": 0, "accuracy": 1, "blå": 2}  # Names that pictures must show; their channels.

PREPARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tensorflow_datasets"
if PREPARED.is_dir():
    os.environ.setdefault("TFDS_DATA_DIR", str(PREPARED))


def cifar10_on_disk():
    """CIFAR-10; where it is not, the test is skipped instead of downloading 160 MB."""
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if not (pathlib.Path(folder).expanduser() / "cifar10").exists():
        pytest.skip("CIFAR-10 is not on disk")
    return load_dataset("cifar10")


def coloured(channel, seed):
    """An image of 20x24 noisy pixels in which a channel is the brightest."""
    pixels = np.random.default_rng([channel, seed]).integers(0, 80, (20, 24, 3))
    pixels[..., channel] += 150
    return Image.fromarray(pixels.astype("uint8"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """`images`, a folder of 75 images in three colours, and `run`, that of a model trained on it.

    One training from the command line, with pictures and report, that many tests read.
    """
    root = tmp_path_factory.mktemp("place")
    for name, channel in CLASSES.items():
        (root / "images" / name).mkdir(parents=True)
        for index in range(25):
            coloured(channel, index).save(root / "images" / name / f"{index}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        patch.setenv("KERAS_BACKEND", keras.backend.backend())
        patch.chdir(root)
        words = [f"--dataset={root / 'images'}", "--output=run", "--no-horizontal-flip"]
        settings = ["--recipe=baseline", "--learning-rate=0.003", "--epochs=2"]
        assert main.main(["train", *TINY, *words, *settings]) == 0
    return root


# By kind of fault: how many were tried, how many survived, epochs lost, files damaged.
FAULTS = {}


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        write = terminalreporter.write_line
        write(f"{'fault, on ' + backend:34} tried  survived  epochs lost  files damaged")
        for name, (tried, survived, epochs, files) in FAULTS.items():
            write(f"{name:34} {tried:5}  {survived:8}  {epochs:11}  {files:13}")
