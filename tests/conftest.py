"""Where the tests find CIFAR-10: in `TFDS_DATA_DIR`, else prepared beside this repository."""

import os
import pathlib

import pytest

from keras_vit import load_dataset

PREPARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tensorflow_datasets"
if PREPARED.is_dir():
    os.environ.setdefault("TFDS_DATA_DIR", str(PREPARED))


def cifar10_on_disk():
    """CIFAR-10; where it is not, the test is skipped instead of downloading 160 MB."""
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if not (pathlib.Path(folder).expanduser() / "cifar10").exists():
        pytest.skip("CIFAR-10 is not on disk")
    return load_dataset("cifar10")


# By kind of fault: how many were tried, how many survived, epochs lost, files damaged.
FAULTS = {}


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        write = terminalreporter.write_line
        write(f"{'fault, on ' + backend:34} tried  survived  epochs lost  files damaged")
        for name, (tried, survived, epochs, files) in FAULTS.items():
            write(f"{name:34} {tried:5}  {survived:8}  {epochs:11}  {files:13}")
