"""Fixtures and data that several tests share; CIFAR-10 is read from `TFDS_DATA_DIR`."""

import functools
import os
import pathlib
import shutil

import numpy as np
import pytest
from PIL import Image

TINY = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=2", "--batch-size=8"]
# Class names hard to draw, and their channels.
CLASSES = {"$_$": 0, "accuracy": 1, "blå": 2}

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Debian's browser must neither ask for a sandbox as root nor for its makers' hosts.
FLAGS = [
    *("--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
]

# One core for each worker of pytest-xdist: threads of several on the same cores would wait for each
# other.
WORKER = os.environ.get("PYTEST_XDIST_WORKER")
if WORKER and hasattr(os, "sched_setaffinity"):
    CORES = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {CORES[int(WORKER.removeprefix("gw")) % len(CORES)]})

PREPARED = pathlib.Path(__file__).resolve().parents[2] / "shared" / "tensorflow_datasets"
if PREPARED.is_dir():
    os.environ.setdefault("TFDS_DATA_DIR", str(PREPARED))


@functools.cache
def cifar10_on_disk():
    """CIFAR-10; skips the test if it is not on disk, instead of downloading 160 MB."""
    folder = os.environ.get("TFDS_DATA_DIR", "~/tensorflow_datasets")
    if not (pathlib.Path(folder).expanduser() / "cifar10").exists():
        pytest.skip("CIFAR-10 is not on disk")
    from keras_vit import load_dataset  # The process that only distributes tests needs no Keras.

    return load_dataset("cifar10")


def coloured(channel, seed):
    """A noisy image of 20x24 pixels in which one channel is the brightest."""
    pixels = np.random.default_rng([channel, seed]).integers(0, 80, (20, 24, 3))
    pixels[..., channel] += 150
    return Image.fromarray(pixels.astype("uint8"))


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with `images`, 75 images in three colours, and `run`, a run directory of them.

    The model is trained once from the command line; many tests read the results.
    """
    import keras

    from keras_vit_cli import main

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


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with playwright.sync_playwright() as api:
        browser = api.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser):
    """Opens a file; afterwards, nothing may have been complained about or asked for."""
    contexts, noise = [], []

    def opened(path, **settings):
        context = browser.new_context(**settings)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: noise.append(message.text))
        page.on("pageerror", lambda error: noise.append(str(error)))
        address = pathlib.Path(path).resolve().as_uri()
        allowed = (address, "data:", "blob:")
        page.on(
            "request",
            lambda request: request.url.startswith(allowed) or noise.append(request.url),
        )
        page.goto(address)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert noise == []


# By kind of fault: number tried, number survived, epochs lost, files damaged.
FAULTS = {}


def pytest_terminal_summary(terminalreporter):
    if FAULTS:
        backend = os.environ.get("KERAS_BACKEND", "tensorflow")
        write = terminalreporter.write_line
        write(f"{'fault, on ' + backend:34} tried  survived  epochs lost  files damaged")
        for name, (tried, survived, epochs, files) in FAULTS.items():
            write(f"{name:34} {tried:5}  {survived:8}  {epochs:11}  {files:13}")
