"""Runs survive being killed at any time and damaged files: `pytest -m faults`.

Runs are forked from a server that has imported Keras already, so that they start in seconds. A
digest of each checkpoint is logged: after a kill, the same step must be bitwise identical to that
of an uninterrupted run.
"""

import collections
import concurrent.futures
import contextlib
import hashlib
import io
import itertools
import json
import multiprocessing.connection
import os
import pathlib
import random
import shutil
import signal
import stat
import subprocess
import threading
import time
import zipfile

import h5py
import keras
import numpy as np
import pytest
from conftest import FAULTS

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork and SIGKILL"),
    pytest.mark.skipif(
        keras.backend.backend() == "torch", reason="bitwise reproducible on TensorFlow and JAX only"
    ),
]

# Of each of two runs. On the other backend, the same code writes the same files.
KILLS = 10 if keras.backend.backend() == "jax" else 4
EPOCHS, STEPS, SAVE_EVERY = 12, 12, 2  # 96 images in batches of 8
SIZES = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=1", "--patch-size=8"]
DATA = ["--dataset=digits", "--limit-train=96", "--batch-size=8", "--validation=24"]

context = multiprocessing.get_context("forkserver")
# A status can be read once only, and `start` reads those of all processes: of two threads that read
# the same one, the second gets 255.
reading = threading.Lock()
# TensorFlow even on JAX: `keras.utils.set_random_seed` imports it where it is installed.
context.set_forkserver_preload(
    ["keras_vit.reporting.figures", "keras_vit.training", "sklearn.datasets", "tensorflow"]
)


@pytest.fixture(scope="module", autouse=True)
def compilation_cache(tmp_path_factory):
    """Without it, each child process on JAX compiles the same programs again."""
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("jax")))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")


def run(folder, epochs, copies, output):
    """The child process: runs `train.py` in a folder; copies that before each write, if asked."""
    from keras_vit import devices, prediction
    from keras_vit.training import checkpoints
    from keras_vit_cli import main, train

    output = os.open(output / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    save = checkpoints.save

    def recorded(place, checkpoint):
        save(place, checkpoint)
        digest = hashlib.sha256()
        for array in checkpoint.arrays.values():
            digest.update(np.ascontiguousarray(array))
        with open(folder / "notes.txt", "a") as notes:
            notes.write(f"{checkpoint.epoch} {checkpoint.batch} {digest.hexdigest()}\n")

    checkpoints.save = recorded
    # What takes seconds at each start and is tested elsewhere.
    train.draw = lambda *_: None
    devices.operations_per_second = lambda *_: 1e11
    prediction.BATCH_SIZE = 512
    if copies:
        _copy_before_each_write(folder, copies)
    else:
        train.write_pages = lambda *_: None
    arguments = [f"--epochs={epochs}", f"--save-every={SAVE_EVERY}", *DATA, *SIZES]
    places = [f"--output={folder / 'run'}", f"--figures-dir={folder / 'figures'}"]
    os._exit(main.train([*arguments, *places]))


def _copy_before_each_write(folder, copies):
    """Copies a folder before and after each rename: what a kill there would leave on the disk.

    A folder is synchronized after each; before the rename, a file that is, which changes no byte.
    """
    numbers, writing = itertools.count(1), threading.Lock()

    def copy(source, target):
        with contextlib.suppress(FileNotFoundError):  # An old checkpoint is removed meanwhile.
            shutil.copy2(source, target)

    def copying(function):
        def call(*arguments):
            if function is fsync and not stat.S_ISDIR(os.fstat(*arguments).st_mode):
                return function(*arguments)
            with writing:
                place = copies / f"{next(numbers):03}"
                ignored = shutil.ignore_patterns("output.txt")
                shutil.copytree(folder, place, ignore=ignored, copy_function=copy)
                return function(*arguments)

        return call

    fsync = os.fsync
    os.fsync, os.replace = copying(os.fsync), copying(os.replace)


def start(folder, epochs=EPOCHS, copies=None, output=None):
    folder.mkdir(exist_ok=True)
    process = context.Process(target=run, args=(folder, epochs, copies, output or folder))
    with reading:
        process.start()
    return process


def status_of(process, seconds=0):
    """The exit status of a process after waiting for it, or None if it is still running."""
    multiprocessing.connection.wait([process.sentinel], seconds)
    with reading:
        return process.exitcode


def kill(process):
    os.kill(process.pid, signal.SIGKILL)
    assert status_of(process, 60) is not None


def finish(folder, status=0, **options):
    found = status_of(start(folder, **options), 240)
    assert found == status, (folder / "output.txt").read_text()[-3000:]


def is_finished(folder):
    run = folder / "run"
    return (run / "metrics.json").exists() and not any(run.glob("checkpoints/*.checkpoint"))


def notes(folder):
    path = folder / "notes.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def kill_after(folder, count, **options):
    """Starts a run and kills it after `count` checkpoints."""
    process = start(folder, **options)
    wait_for_notes(process, folder, count)
    kill(process)


def wait_for_notes(process, folder, count, seconds=120):
    deadline = time.monotonic() + seconds
    while len(notes(folder)) < count and time.monotonic() < deadline:
        if status_of(process) is not None:
            break
        time.sleep(0.002)


def result(folder):
    """All results that must not depend on interruptions."""
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    metrics = {key: metrics[key] for key in ("accuracy", "loss", "per_class", "epochs")}
    models = {name: variables_in(folder / "run" / name) for name in ("model.keras", "best.keras")}
    return metrics, (folder / "run" / "history.csv").read_text(), models


def variables_in(path):
    """The bytes of all variables in a `.keras` file, by name."""
    with zipfile.ZipFile(path) as archive:
        content = io.BytesIO(archive.read("model.weights.h5"))
    found = {}

    def add(name, item):
        if isinstance(item, h5py.Dataset):
            found[name] = item[()].tobytes()

    with h5py.File(content) as file:
        file.visititems(add)
    assert found
    return found


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """For a number of epochs, the digests and the result of an uninterrupted run."""
    known = {}

    def of(epochs):
        if epochs not in known:
            folder = tmp_path_factory.mktemp(f"uninterrupted-{epochs}")
            finish(folder, epochs=epochs)
            digests = {(epoch, batch): digest for epoch, batch, digest in notes(folder)}
            known[epochs] = digests, result(folder), folder
        return known[epochs]

    return of


def lost_epochs(folder):
    """Most epochs lost by a kill: between the last checkpoint before and the first after it."""
    steps = [int(epoch) * STEPS + int(batch) for epoch, batch, _ in notes(folder)]
    back = [before + SAVE_EVERY - after for before, after in zip(steps, steps[1:])]
    return max(back, default=0) // STEPS


def assert_nothing_lost(folder, uninterrupted, epochs):
    digests, expected, _ = uninterrupted(epochs)
    for epoch, batch, digest in notes(folder):
        assert digest == digests[epoch, batch], f"epoch {epoch}, batch {batch} differs"
    assert result(folder) == expected
    assert not list((folder / "run").rglob(".part-*"))


def two_at_a_time(function, items):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        return list(pool.map(function, items))


def kill_often(folder, seed):
    """Kills a run repeatedly, then lets it finish; returns the number of kills."""
    rng = random.Random(seed)
    for kills in range(KILLS):
        process = start(folder)
        before = len(notes(folder))
        # Most are killed soon after a checkpoint or while writing one, some before the first.
        new, soon = rng.choice([1, 1, 1, 2, 3]), rng.random() < 0.2
        wait_for_notes(process, folder, before + new, rng.uniform(0, 2) if soon else 120)
        time.sleep(rng.uniform(0, 0.05))
        if status_of(process) is not None:
            return kills
        kill(process)
    if not is_finished(folder):
        finish(folder)
    return KILLS


def test_kills_at_random_moments(uninterrupted, tmp_path):
    uninterrupted(EPOCHS)
    folders = [tmp_path / "first", tmp_path / "second"]
    kills = two_at_a_time(lambda folder: kill_often(folder, folder.name), folders)
    assert kills == [KILLS, KILLS], "the runs were over too early: make them longer"
    for folder in folders:
        assert_nothing_lost(folder, uninterrupted, EPOCHS)
    lost = max(lost_epochs(folder) for folder in folders)
    FAULTS["kills at random moments"] = (sum(kills), sum(kills), lost, 0)


def test_a_kill_inside_every_write(uninterrupted, tmp_path):
    """Resumes what a kill before and after each rename of a run of one epoch would leave."""
    uninterrupted(1)
    copies = tmp_path / "copies"
    finish(tmp_path / "whole", epochs=1, copies=copies)

    def resumes(folder):
        if not is_finished(folder):
            finish(folder, epochs=1)
        assert_nothing_lost(folder, uninterrupted, 1)
        shutil.rmtree(folder)

    left = sorted(copies.iterdir())
    assert len(left) > 20
    two_at_a_time(resumes, left)
    FAULTS["kills inside a write"] = (len(left), len(left), 0, 0)


def flipped(content):
    """Flips a bit in the middle; in JSON, in the first key, so that its length does not matter."""
    at = content.find(b'"') + 1 if content[:1] == b"{" else len(content) // 2
    return content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: content[: len(content) // 2]], ids=["flipped", "truncated"]
)
def test_damage_to_each_file_of_a_run_directory(damage, uninterrupted, tmp_path):
    """Whichever file is damaged, the run resumes to the same result, or names the bad file."""
    source = tmp_path / "source"
    kill_after(source, STEPS // SAVE_EVERY + 4, epochs=3)
    uninterrupted(3)
    files = (path for path in (source / "run").rglob("*") if path.is_file())
    paths = sorted(path for path in files if not path.name.startswith("."))

    def survives(path):
        folder = tmp_path / f"damaged-{path.name}"
        shutil.copytree(source, folder, ignore=shutil.ignore_patterns("output.txt"))
        victim = folder / "run" / path.relative_to(source / "run")
        victim.write_bytes(damage(victim.read_bytes()))
        status = status_of(start(folder, epochs=3), 240)
        if status == 0:
            assert_nothing_lost(folder, uninterrupted, 3)
            return True
        last = last_line(folder)
        assert status == 2, last
        assert last.startswith("error: ") and path.name in last
        # The content of these files cannot be recovered.
        assert path.name in ("best.keras", "config.json"), last
        return False

    tried, survived = len(paths), sum(two_at_a_time(survives, paths))
    assert tried >= 4
    name = f"files {'flipped' if damage is flipped else 'truncated'}"
    FAULTS[name] = (tried, survived, 0, tried)


@pytest.fixture
def small_disk(tmp_path):
    """A separate file system with room for little more than one checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def remount(folder, options):
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def last_line(folder):
    return (folder / "output.txt").read_text().strip().splitlines()[-1]


def test_a_full_disk(uninterrupted, small_disk):
    finish(small_disk, status=1, epochs=1)
    assert last_line(small_disk).startswith("error: ")
    assert "no space left on device" in last_line(small_disk)
    remount(small_disk, "size=50m")
    finish(small_disk, epochs=1)
    assert_nothing_lost(small_disk, uninterrupted, 1)
    FAULTS["full disk"] = (1, 1, 0, 0)


def test_a_disk_that_becomes_read_only(uninterrupted, small_disk, tmp_path):
    remount(small_disk, "size=50m")
    kill_after(small_disk, 4, epochs=3)
    remount(small_disk, "ro")
    assert status_of(start(small_disk, epochs=3, output=tmp_path), 120) == 2
    assert last_line(tmp_path).endswith("unchanged. Choose another --figures-dir.")
    remount(small_disk, "rw")
    finish(small_disk, epochs=3)
    assert_nothing_lost(small_disk, uninterrupted, 3)
    FAULTS["read-only disk"] = (1, 1, 0, 0)


def test_a_run_directory_that_is_removed(tmp_path):
    folder = tmp_path / "here"
    process = start(folder, epochs=EPOCHS, output=tmp_path)
    wait_for_notes(process, folder, 4)
    folder.rename(tmp_path / "elsewhere")
    assert status_of(process, 120) == 1
    assert last_line(tmp_path).startswith("error: ")
    assert "no such file or directory" in last_line(tmp_path)


def test_open_files_and_memory_do_not_grow(tmp_path):
    """A tiny run of 200 epochs in this process."""
    from test_training import colours, small_recipe

    from keras_vit import training
    from keras_vit.training import fitting

    dataset, seen = colours(48), collections.defaultdict(list)

    class Watcher(fitting.Journal):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            self._written.result()
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            seen["pages"].append(pages)
            seen["files"].append(len(os.listdir("/proc/self/fd")))

    patch = pytest.MonkeyPatch()
    patch.setattr(fitting, "Journal", Watcher)
    try:
        recipe = small_recipe(epochs=200)
        model = training.build_model(dataset, recipe)
        training.fit(model, dataset, recipe, run_dir=tmp_path)
    finally:
        patch.undo()
    assert seen["pages"][-1] < 1.05 * seen["pages"][4]
    assert max(seen["files"][4:]) <= seen["files"][4]
