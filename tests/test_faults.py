"""A run that is killed anywhere, or finds its files damaged, loses nothing: `pytest -m faults`.

Runs are children of a server that has imported Keras already, so that a start takes seconds.
Every checkpoint notes a digest of its arrays: after a kill, the same step must come out with the
same bits as in a run that was left alone.
"""

import collections
import hashlib
import json
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import subprocess
import tempfile
import time

import keras
import numpy as np
import pytest
from conftest import FAULTS

pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="for systems with fork and SIGKILL"),
    pytest.mark.skipif(
        keras.backend.backend() == "torch", reason="exact on TensorFlow and JAX alone"
    ),
]

KILLS = 30
EPOCHS, STEPS, SAVE_EVERY = 14, 12, 2  # 96 images in batches of 8
SIZES = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=1", "--patch-size=8"]
DATA = ["--dataset=digits", "--limit-train=96", "--batch-size=8", "--validation=20"]

# Else each child on JAX compiles the same programs anew.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp())
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["keras_vit.figures", "keras_vit.training", "sklearn.datasets"])


def run(folder, epochs, die_at, silent):
    """What a child does: `train.py` in a folder; dies at the so-manieth write if asked to."""
    from keras_vit import checkpoints, cli

    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    save = checkpoints.save

    def noted(place, model, epoch, batch, *rest):
        save(place, model, epoch, batch, *rest)
        digest = hashlib.sha256()
        for variable in checkpoints.state_of(model):
            digest.update(np.ascontiguousarray(keras.ops.convert_to_numpy(variable)))
        with open(folder / "notes.txt", "a") as notes:
            notes.write(f"{epoch} {batch} {digest.hexdigest()}\n")

    checkpoints.save = noted
    if silent:
        cli.draw = lambda *_: None
    if die_at:
        _die_at(die_at)
    arguments = [f"--epochs={epochs}", f"--save-every={SAVE_EVERY}", *DATA, *SIZES]
    places = [f"--output={folder / 'run'}", f"--figures-dir={folder / 'figures'}"]
    os._exit(cli.main([*arguments, *places]))


def _die_at(count):
    """Kills this process in the midst of its so-manieth flush or rename."""
    calls = iter(range(1, 10**9))

    def deadly(function):
        def call(*arguments):
            if next(calls) == count:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments)

        return call

    os.fsync, os.replace = deadly(os.fsync), deadly(os.replace)


def start(folder, epochs=EPOCHS, die_at=None, silent=True):
    folder.mkdir(exist_ok=True)
    process = context.Process(target=run, args=(folder, epochs, die_at, silent))
    process.start()
    return process


def finish(folder, status=0, **options):
    process = start(folder, **options)
    process.join(240)
    assert process.exitcode == status, (folder / "output.txt").read_text()[-3000:]


def is_finished(folder):
    run = folder / "run"
    return (run / "metrics.json").exists() and not any(run.glob("checkpoints/*.checkpoint"))


def notes(folder):
    path = folder / "notes.txt"
    return [line.split() for line in path.read_text().splitlines()] if path.exists() else []


def result(folder):
    """Everything that must not depend on what happened on the way."""
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    numbers = {key: metrics[key] for key in ("accuracy", "loss", "per_class", "epochs")}
    models = {
        name: [x.tolist() for x in keras.saving.load_model(folder / "run" / name).get_weights()]
        for name in ("model.keras", "best.keras")
    }
    return numbers, (folder / "run" / "history.csv").read_text(), models


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """For a number of epochs, the notes and the result of a run that is left alone."""
    known = {}

    def of(epochs):
        if epochs not in known:
            folder = tmp_path_factory.mktemp(f"undisturbed-{epochs}")
            finish(folder, epochs=epochs)
            digests = {(epoch, batch): digest for epoch, batch, digest in notes(folder)}
            known[epochs] = digests, result(folder), folder
        return known[epochs]

    return of


def lost_epochs(folder):
    """Most epochs that a kill cost: between the last checkpoint before and the first after it."""
    steps = [int(epoch) * STEPS + int(batch) for epoch, batch, _ in notes(folder)]
    back = [before + SAVE_EVERY - after for before, after in zip(steps, steps[1:])]
    return max(back, default=0) // STEPS


def assert_nothing_lost(folder, undisturbed, epochs):
    digests, expected, _ = undisturbed(epochs)
    for epoch, batch, digest in notes(folder):
        assert digest == digests[epoch, batch], f"epoch {epoch}, batch {batch} differs"
    assert result(folder) == expected
    assert not list((folder / "run").rglob(".part-*"))


def test_kills_at_random_moments(undisturbed, tmp_path):
    luck, folder = random.Random(0), tmp_path / "killed"
    undisturbed(EPOCHS)
    kills = 0
    while kills < KILLS:
        process = start(folder)
        before, deadline = len(notes(folder)), time.monotonic() + 120
        # Some die before they learn anything, most soon after a checkpoint or within one.
        wanted = before + luck.choice([0, 1, 1, 2, 3])
        while len(notes(folder)) < wanted and time.monotonic() < deadline:
            if not process.is_alive():
                break
            time.sleep(0.002)
        time.sleep(luck.uniform(0, 0.05) if wanted > before else luck.uniform(0, 4))
        if not process.is_alive():
            break
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
    if not is_finished(folder):
        finish(folder)
    assert kills == KILLS, f"the run was over after {kills} kills: make it longer"
    assert_nothing_lost(folder, undisturbed, EPOCHS)
    FAULTS["kills at random moments"] = (kills, kills, lost_epochs(folder), 0)


def test_a_kill_inside_every_write(undisturbed, tmp_path):
    """One epoch of two checkpoints, its numbers and its model: each flush and rename in turn."""
    died = 0
    for count in range(1, 200):
        folder = tmp_path / str(count)
        process = start(folder, epochs=1, die_at=count)
        process.join(120)
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL, (folder / "output.txt").read_text()[-2000:]
        died += 1
        if not is_finished(folder):
            finish(folder, epochs=1)
        assert_nothing_lost(folder, undisturbed, 1)
        shutil.rmtree(folder)
    assert died > 20
    FAULTS["kills inside a write"] = (died, died, 0, 0)


def flipped(content):
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]


@pytest.mark.parametrize(
    "damage", [flipped, lambda content: content[: len(content) // 2]], ids=["flipped", "cut off"]
)
def test_damage_of_every_file_of_a_folder(damage, undisturbed, tmp_path):
    """Whatever file is hit, the run goes on to the same end, or says which file to give up."""
    source = tmp_path / "source"
    process = start(source, epochs=3)
    while len(notes(source)) < STEPS // SAVE_EVERY + 4:
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    tried = survived = 0
    for path in sorted((source / "run").rglob("*")):
        if not path.is_file() or path.name.startswith("."):
            continue
        folder = tmp_path / f"damaged-{path.name}"
        shutil.copytree(source, folder)
        victim = folder / "run" / path.relative_to(source / "run")
        victim.write_bytes(damage(victim.read_bytes()))
        process = start(folder, epochs=3)
        process.join(240)
        output = (folder / "output.txt").read_text()
        tried += 1
        if process.exitcode == 0:
            assert_nothing_lost(folder, undisturbed, 3)
            survived += 1
        else:
            assert process.exitcode == 2, output[-3000:]
            last = output.strip().splitlines()[-1]
            assert last.startswith("error: ") and path.name in last
    assert tried >= 4 and survived >= tried - 1
    name = f"files {'flipped' if damage is flipped else 'cut off'}"
    FAULTS[name] = (tried, survived, 0, tried)


def test_a_disk_that_is_full(undisturbed, tmp_path):
    """A file system of its own that has room for little more than one checkpoint."""
    folder = tmp_path / "small"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=48k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("no right to mount a file system")
    try:
        process = start(folder, epochs=1)
        process.join(120)
        output = (folder / "output.txt").read_text()
        assert process.exitcode == 1, output[-2000:]
        assert "No space left on device" in output.strip().splitlines()[-1]
        larger = ["mount", "-o", "remount,size=50m", str(folder)]
        subprocess.run(larger, check=True)
        finish(folder, epochs=1)
        assert_nothing_lost(folder, undisturbed, 1)
    finally:
        subprocess.run(["umount", str(folder)], check=True)
    FAULTS["full disk"] = (1, 1, 0, 0)


def test_open_files_and_memory_do_not_grow():
    """200 epochs of a tiny run in this process."""
    from test_training import colours, small_recipe

    from keras_vit import training

    dataset, seen = colours(48), collections.defaultdict(list)

    class Watcher(training.Journal):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            pages = int(pathlib.Path("/proc/self/statm").read_text().split()[1])
            seen["pages"].append(pages)
            seen["files"].append(len(os.listdir("/proc/self/fd")))

    patch = pytest.MonkeyPatch()
    patch.setattr(training, "Journal", Watcher)
    try:
        recipe = small_recipe(epochs=200)
        model = training.build_model(dataset, recipe)
        training.fit(model, dataset, recipe)
    finally:
        patch.undo()
    assert seen["pages"][-1] < 1.05 * seen["pages"][4]
    assert max(seen["files"][4:]) == min(seen["files"][4:])
