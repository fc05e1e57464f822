"""Training on several devices, and in several processes that meet over the loopback interface.

Each test with more than one device starts programs of its own: JAX settles on devices and
processes when it is first used. `pytest -m faults` kills processes.
"""

import hashlib
import importlib.util
import json
import os
import pathlib
import random
import re
import signal
import socket
import subprocess
import sys
import time
import types
from functools import partial

import keras
import numpy as np
import pytest
from test_training import colours, small_recipe

from keras_vit import distribution, training
from keras_vit.data.batches import Batches, InOrder
from keras_vit_cli import main

needs_jax = pytest.mark.skipif(
    importlib.util.find_spec("jax") is None, reason="only JAX distributes training"
)

PROGRAM = """
import sys
sys.path[:0] = {paths!r}
import test_distribution
sys.exit(getattr(test_distribution, sys.argv[1])(*sys.argv[2:]))
"""
HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
LIMIT = 600  # Seconds within which any program ends.
# A peer's death is noticed at once where a connection breaks, and by its silence otherwise.
NOTICED = distribution.HEARTBEAT + 30

DATA = ["--dataset=digits", "--limit-train=97", "--validation=21", "--batch-size=8"]
SIZES = ["--embed-dim=16", "--mlp-dim=16", "--num-heads=2", "--depth=1", "--patch-size=8"]
# 12 steps in an epoch, which leaves out one of 97 images.
TRAIN = [*DATA, *SIZES, "--epochs=3", "--save-every=2", "--dropout=0.2"]
LONG = [*TRAIN, "--epochs=60"]  # For runs that are stopped.
KILLS = 2  # Of each of two processes


# What runs in a program of its own.


def train_on_devices(path):
    """Trains on all devices and then on one of them; writes metrics and weights of both."""
    results = {}
    for name in ("all", "one"):
        if name == "all":
            distribution.connect("devices")
        else:
            distribution.leave()
        dataset, validation = colours(98).hold_out(22, seed=0)
        recipe = small_recipe(epochs=2, dropout=0.2, mixup=0.5, cutmix=0.5, erasing=0.5)
        keras.utils.set_random_seed(0)
        model = training.build_model(dataset, recipe)
        history = training.fit(model, dataset, recipe, 0, validation)
        for key in ("loss", "val_loss", "val_accuracy"):
            results[f"{name} {key}"] = history[key]
        for index, weight in enumerate(model.get_weights()):
            results[f"{name} weight {index}"] = weight
    np.savez(path, devices=len(keras.distribution.list_devices()), **results)


def train_from_command_line(folder, *arguments):
    """Runs `train`; writes what this process ends up with, and a line for each checkpoint."""
    from keras_vit.training import checkpoints, fitting
    from keras_vit_cli import main, train

    def recorded_fit(model, *rest):
        history = training_fit(model, *rest)
        state = checkpoints.copy_of_state(model)
        digest = hashlib.sha256(b"".join(array.tobytes() for array in state.values()))
        history = {key: value for key, value in history.items() if key != "seconds"}
        path = pathlib.Path(folder) / f"process-{distribution.process()}.json"
        path.write_text(json.dumps([digest.hexdigest(), history]))
        return {**history, "seconds": [1.0]}

    training_fit, training.fit = fitting.fit, recorded_fit
    train.draw = lambda *_: None  # Drawing takes seconds and is tested elsewhere.
    run = f"--output={pathlib.Path(folder) / 'run'}"
    return main.train([*arguments, run, f"--figures-dir={pathlib.Path(folder) / 'figures'}"])


# How programs are started and waited for.


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """A folder of compiled programs, and of a TensorFlow that is quick to import: there is none."""
    folder = tmp_path_factory.mktemp("compiled")
    (folder / "tensorflow.py").write_text("raise ImportError('left out')")
    return folder


def on_all_cores():
    """Undoes that `conftest.py` gives each worker of pytest-xdist one core."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, range(os.cpu_count() or 1))


@pytest.fixture
def start(compiled):
    """Starts a function of this file in a program; what is left of them is killed at the end."""
    started = []
    others = {k: v for k, v in os.environ.items() if k != "PYTEST_XDIST_WORKER"}

    def program(output, *words, **environment):
        defaults = {"KERAS_BACKEND": "jax", "JAX_COMPILATION_CACHE_DIR": str(compiled)}
        defaults |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        with open(output, "w") as file:
            started.append(
                subprocess.Popen(
                    [
                        *(sys.executable, "-c"),
                        PROGRAM.format(paths=[*map(str, (compiled, HERE, HERE.parent, ROOT))]),
                        *map(str, words),
                    ],
                    env={**others, **defaults, **environment},
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    preexec_fn=on_all_cores,
                )
            )
        return started[-1]

    yield program
    for process in started:
        if process.poll() is None:
            process.kill()
        process.wait(LIMIT)


def by_hand(port, index):
    """Keras's own variables."""
    values = {
        "JOB_ADDRESSES": f"127.0.0.1:{port}",
        "NUM_PROCESSES": "2",
        "PROCESS_ID": str(index),
    }
    return {f"KERAS_DISTRIBUTION_{name}": value for name, value in values.items()}


def slurm(port, index):
    """What `srun` tells the processes of a job."""
    step = {"STEP_NODELIST": "127.0.0.1", "NTASKS": "2", "PROCID": str(index), "LOCALID": "0"}
    variables = {f"SLURM_{name}": value for name, value in {"JOB_ID": "7", **step}.items()}
    return {**variables, "JAX_COORDINATOR_PORT": str(port)}


@pytest.fixture
def pair(start):
    """Starts `train` in two processes that write into one folder, or each into its own."""

    def processes(folder, *arguments, launcher=by_hand, others=None):
        with socket.socket() as found:
            found.bind(("127.0.0.1", 0))
            port = found.getsockname()[1]
        both = []
        for index in range(2):
            own = folder if index == 0 else others or folder
            own.mkdir(exist_ok=True)
            words = arguments[index] if isinstance(arguments[0], list) else arguments
            both.append(
                start(
                    own / f"output-{index}.txt",
                    *("train_from_command_line", own, "--distribute=hosts", *words),
                    **launcher(port, index),
                )
            )
        return both

    return processes


def output(folder, index=0):
    return (folder / f"output-{index}.txt").read_text()


def finish(processes, folder, status=0):
    assert [process.wait(LIMIT) for process in processes] == [status] * len(processes), (
        output(folder)[-2000:] + output(folder, 1)[-2000:]
    )


def result(folder, index=0):
    """Digest of weights, optimizer and seeds, and the history, as a process ended."""
    return json.loads((folder / f"process-{index}.json").read_text())


def wait_for(condition):
    deadline = time.monotonic() + LIMIT
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def saved(folder):
    """Names of the checkpoints of a run."""
    return {path.name for path in (folder / "run" / "checkpoints").glob("step-*")}


# Batches, as each process sees them.


@pytest.fixture
def seen_by(monkeypatch):
    """What a function returns in each of some processes with one device each."""

    def values(count, function):
        found = []
        monkeypatch.setattr(distribution, "devices", lambda: count)
        monkeypatch.setattr(distribution, "processes", lambda: count)
        for index in range(count):
            monkeypatch.setattr(distribution, "process", lambda index=index: index)
            found.append(function())
        return found

    return values


def indices_of(epoch, images, batch_size):
    """The images of each batch of an epoch, whose label is their index."""
    batches = Batches(np.zeros((images, 1, 1, 1)), np.arange(images), batch_size, seed=5)
    batches.start_epoch(epoch)
    return [batches[index][1] for index in range(batches.num_batches)]


@pytest.mark.parametrize("images", [48, 50])
def test_the_parts_of_the_processes_make_up_the_batches_of_one_process(images, seen_by):
    alone = indices_of(3, images, 8)
    parts = seen_by(4, lambda: indices_of(3, images, 8))
    together = [np.concatenate(batch) for batch in zip(*parts, strict=True)]
    for ours, theirs in zip(together[:6], alone[:6], strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert sum(map(len, together)) == 48
    assert all(len({len(part) for part in batch}) == 1 for batch in zip(*parts))


def test_other_images_are_left_out_in_each_epoch(seen_by):
    def left_out(epoch):
        parts = seen_by(4, lambda: np.concatenate(indices_of(epoch, 51, 8)))
        return frozenset(range(51)) - set(np.concatenate(parts).tolist())

    epochs = [left_out(epoch) for epoch in range(1, 5)]
    assert all(len(images) == 3 for images in epochs)
    assert len(set(epochs)) == 4


def test_a_padded_validation_set_has_the_metrics_of_the_images_alone(seen_by):
    labels, logits = np.arange(22) % 3, np.random.default_rng(0).normal(size=(22, 3))
    images = np.arange(22).reshape(-1, 1, 1, 1)

    def evaluated():
        in_order = InOrder(images, labels, 8)
        return in_order.padding, [in_order[i] for i in range(in_order.num_batches)]

    shares = seen_by(4, evaluated)
    padding = shares[0][0]
    places, found, weights = (
        np.concatenate([batch[part] for _, batches in shares for batch in batches])
        for part in range(3)
    )
    chosen = logits[places.ravel()]
    losses = np.log(np.exp(chosen).sum(axis=1)) - chosen[np.arange(24), found]
    right = chosen.argmax(axis=1) == found
    expected = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(22), labels]
    assert padding * (losses * weights).mean() == pytest.approx(expected.mean())
    assert padding * right.mean() == pytest.approx((logits.argmax(axis=1) == labels).mean())


def test_a_batch_that_the_devices_do_not_divide_is_refused_with_others_to_try(seen_by):
    message = "3 devices divide, such as 15 or 18. Received: batch_size=16"
    with pytest.raises(ValueError, match=message):
        seen_by(3, lambda: indices_of(1, 48, 16))


# How processes find each other.


@pytest.mark.parametrize("kind", ["devices", "hosts"])
def test_another_backend_is_refused_with_what_to_type(kind, capsys, monkeypatch):
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    with pytest.raises(distribution.DistributionError) as refusal:
        distribution.connect(kind)
    assert str(refusal.value).endswith("computes with torch: add --backend jax")
    if kind == "devices":  # The other one ends the process.
        assert main.train(["--distribute=devices", "--dataset=digits"]) == 2
        assert capsys.readouterr().err == f"error: {refusal.value}\n"


@pytest.fixture
def met(monkeypatch):
    """What JAX would start or connect to: address, number of processes, index."""
    from jax._src import distributed, xla_bridge
    from jax._src.lib import _jax

    found = {}
    client = types.SimpleNamespace(connect=lambda: None)
    monkeypatch.setattr(xla_bridge, "backends_are_initialized", lambda: False)
    monkeypatch.setattr(distributed.State, "initialize_preemption_sync_manager", lambda _: None)
    monkeypatch.setattr(
        _jax,
        "get_distributed_runtime_service",
        lambda address, count, **_: found.update(count=count),
    )
    monkeypatch.setattr(
        _jax,
        "get_distributed_runtime_client",
        lambda address, index, **_: found.update(address=address, index=index) or client,
    )
    monkeypatch.setattr(distributed.config, "update", lambda *_: None)
    for name in os.environ:
        if name.startswith(("KERAS_DISTRIBUTION", "JAX_", "SLURM", "OMPI", "KUBERNETES")):
            monkeypatch.delenv(name)

    def connected(variables):
        for name, value in variables.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(distributed, "global_state", distributed.State())
        distribution._connect_processes()
        return found["address"], distributed.global_state.num_processes, found["index"]

    return connected


@needs_jax
def test_processes_are_found_by_keras_variables_slurm_open_mpi_and_kubeflow(met, monkeypatch):
    step = {"STEP_NODELIST": "gpu[07-09]", "NTASKS": "6", "PROCID": "4", "LOCALID": "1"}
    launchers = [
        ({**by_hand(1234, 1), "KERAS_DISTRIBUTION_JOB_ADDRESSES": "a:12,b:34"}, ("a:12", 2, 1)),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:5", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            ("a:5", 3, 2),
        ),
        (
            {f"SLURM_{name}": value for name, value in {"JOB_ID": "7", **step}.items()},
            ("gpu07:61447", 6, 4),
        ),
        (
            {
                "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            ("10.96.0.1:62624", 4, 3),
        ),
    ]
    for variables, expected in launchers:
        assert met(variables) == expected
        for name in variables:
            monkeypatch.delenv(name)


@needs_jax
def test_processes_are_found_by_kubernetes_jobsets(met, monkeypatch):
    from jax._src.clusters import k8s_cluster

    name = {"jobset.sigs.k8s.io/jobset-name": "vit"}
    labels = {"job-name": "vit-workers-0", **name}
    pod = {
        "metadata": types.SimpleNamespace(
            labels=labels,
            name="pod",
            owner_references=[types.SimpleNamespace(controller=True, kind="Job")],
            annotations={"batch.kubernetes.io/job-completion-index": "1"},
        ),
        "spec": types.SimpleNamespace(subdomain="vit"),
    }
    job = {
        "metadata": types.SimpleNamespace(labels=name, name="vit-workers-0"),
        "spec": types.SimpleNamespace(parallelism=2, completions=2),
    }
    cluster = k8s_cluster.K8sCluster
    monkeypatch.setattr(cluster, "is_env_present", classmethod(lambda _: True))
    monkeypatch.setattr(cluster, "_pod", classmethod(lambda _: types.SimpleNamespace(**pod)))
    monkeypatch.setattr(cluster, "_job", classmethod(lambda _: types.SimpleNamespace(**job)))
    monkeypatch.setattr(k8s_cluster.socket, "gethostbyname", lambda host: "10.0.0.1")
    monkeypatch.setattr(k8s_cluster.time, "sleep", lambda _: None)
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    assert met({}) == ("vit-workers-0-0.vit:55527", 2, 1)


@needs_jax
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"PROCESS_ID": "2"}, "PROCESS_ID from 0 to .*Received: .*PROCESS_ID=2"),
        ({"PROCESS_ID": "one"}, "PROCESS_ID=one"),
        ({"JOB_ADDRESSES": "host0"}, "must be like host0:1234.*JOB_ADDRESSES=host0"),
        ({"JOB_ADDRESSES": "a:1,b:1,c:1"}, "one address for each process"),
        ({"PROCESS_ID": ""}, "no job of SLURM, Open MPI or Kubernetes .*PROCESS_ID=0 or 1 in"),
    ],
)
def test_variables_that_do_not_fit_together_are_refused_in_one_line(changes, message, met):
    changes = {f"KERAS_DISTRIBUTION_{name}": value for name, value in changes.items()}
    with pytest.raises(distribution.DistributionError, match=message) as refusal:
        met({**by_hand(1234, 0), **changes})
    assert "\n" not in str(refusal.value)


# Several devices of one process.


@pytest.mark.slow
@needs_jax
def test_four_devices_learn_what_one_does(start, tmp_path):
    """With random augmentation and dropout, whose draws are those of the whole batch."""
    path = tmp_path / "results.npz"
    process = start(tmp_path / "output.txt", "train_on_devices", path, JAX_NUM_CPU_DEVICES="4")
    assert process.wait(LIMIT) == 0, (tmp_path / "output.txt").read_text()[-2000:]
    with np.load(path) as found:
        assert found["devices"] == 4
        for name in found:
            if name.startswith("all "):
                ours, theirs = found[name], found[name.replace("all ", "one ")]
                # The order of sums differs.
                np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4, err_msg=name)


# Two processes.


@needs_jax
@pytest.mark.slow
def test_two_processes_end_up_with_equal_bits_whenever_they_train(pair, start, tmp_path):
    folders = tmp_path / "first", tmp_path / "second"
    for folder, launcher in zip(folders, (by_hand, slurm)):
        finish(pair(folder, *TRAIN, launcher=launcher), folder)
    first, *others = [result(folder, index) for folder in folders for index in range(2)]
    assert all(other == first for other in others)
    assert "Distributed over 2 devices of 2 processes: 4 images" in output(folders[0])
    assert "Each epoch skips 1 image, chosen" in output(folders[0])
    assert "Epoch" not in output(folders[0], 1)
    assert (folders[0] / "run" / "report.html").exists()

    # One process with as many devices runs the same program.
    alone = tmp_path / "alone"
    alone.mkdir()
    words = "train_from_command_line", alone, "--distribute=devices", *TRAIN
    process = start(alone / "output-0.txt", *words, JAX_NUM_CPU_DEVICES="2")
    finish([process], alone)
    for key, values in result(alone)[1].items():
        if key != "precision":
            np.testing.assert_allclose(first[1][key], values, rtol=1e-3, atol=1e-4, err_msg=key)
    for ours, theirs in zip(*map(weights, (folders[0], alone)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-4)


def weights(folder):
    return keras.saving.load_model(folder / "run" / "model.keras").get_weights()


@needs_jax
@pytest.mark.slow
@pytest.mark.parametrize("told", [0, 1])
def test_sigterm_to_one_process_saves_the_same_step_in_all(told, pair, tmp_path):
    processes = pair(tmp_path, *LONG)
    wait_for(lambda: saved(tmp_path))
    processes[told].send_signal(signal.SIGTERM)
    finish(processes, tmp_path, status=143)
    places = [re.findall(r"Stopped (.*?); progress saved", output(tmp_path, i)) for i in range(2)]
    assert places[0] == places[1] and len(places[0]) == 1


@needs_jax
@pytest.mark.slow
def test_a_run_with_progressive_resizing_continues_on_another_number_of_devices(
    pair, start, tmp_path
):
    resizing = ["--image-scales=0.5", "--image-scale-milestones=0.5", "--mixup=0.5"]
    recipe = [*TRAIN, *resizing, "--epochs=20"]
    processes = pair(tmp_path, *recipe)
    wait_for(lambda: any(name.startswith("step-000001") for name in saved(tmp_path)))
    processes[0].kill()
    assert processes[1].wait(LIMIT) != 0
    words = "train_from_command_line", tmp_path, *recipe
    finish([start(tmp_path / "output-0.txt", *words)], tmp_path)
    assert (
        "Resuming on 1 device; the checkpoint was written on 2 devices of 2 processes."
        in output(tmp_path)
    )


@needs_jax
@pytest.mark.slow
def test_a_process_that_differs_is_named_before_training(pair, tmp_path):
    other = [*TRAIN, "--learning-rate=0.5", "--seed=3"]
    finish(pair(tmp_path, list(TRAIN), other), tmp_path, status=2)
    for index in range(2):
        line = output(tmp_path, index).strip().splitlines()[-1]
        assert re.match(r"error: process 1 on \S+ differs from process 0 on \S+: ", line), line
        assert "seed is 3 there and 0 in process 0" in line
        assert "learning_rate is 0.5 there" in line
        assert "training data is" in line  # `--limit-train` draws with the seed.
    assert not saved(tmp_path)


@needs_jax
@pytest.mark.slow
def test_what_one_process_cannot_read_ends_the_other(pair, tmp_path):
    lacking = ["--dataset=/nowhere", *TRAIN[1:]]
    finish(pair(tmp_path, list(TRAIN), lacking), tmp_path, status=2)
    assert "error: process 1: " in output(tmp_path) and "/nowhere" in output(tmp_path)


@needs_jax
@pytest.mark.slow
def test_a_first_process_without_the_checkpoint_says_where_it_is(pair, tmp_path):
    own, others = tmp_path / "own", tmp_path / "others"
    processes = pair(own, *LONG, others=others)
    wait_for(lambda: saved(own))
    processes[1].terminate()
    assert [process.wait(LIMIT) for process in processes] == [143, 143]
    # The processes change places: the second one's disk has the checkpoint.
    processes = pair(others, *LONG, others=own)
    assert [process.wait(LIMIT) for process in processes] == [2, 2]
    assert "has no checkpoint in" in output(others) and "but process 1 on" in output(others)


def is_further(folder, before, process):
    """Whether a run has a new checkpoint, or a process of it has ended."""
    return saved(folder) - before or process.poll() is not None


def has_started(folder, before, process):
    """Whether the processes of a run have met and agreed, or one of them has ended."""
    return "Compiling" in output(folder) or process.poll() is not None


@needs_jax
@pytest.mark.faults
def test_a_killed_process_ends_the_other_and_all_resume_without_loss(pair, tmp_path):
    """Each process is killed twice in a run that ends as one that was never killed."""
    expected, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    recipe = [*TRAIN, "--epochs=30"]
    finish(pair(expected, *recipe), expected)
    rng, waits = random.Random(0), []
    for kill in range(2 * KILLS):
        before = saved(killed)
        processes = pair(killed, *recipe)
        victim, other = processes[kill % 2], processes[1 - kill % 2]
        # Soon after a checkpoint, or while the first step is compiled.
        soon = is_further if kill % 4 < 2 else has_started
        wait_for(partial(soon, killed, before, victim))
        time.sleep(rng.uniform(0, 0.3))
        assert victim.poll() is None, "the run was over too early: make it longer"
        victim.kill()
        killed_at = time.monotonic()
        assert other.wait(LIMIT) != 0
        waits.append(time.monotonic() - killed_at)
    assert max(waits) < NOTICED, waits
    finish(pair(killed, *recipe), killed)
    assert [result(killed, index) for index in range(2)] == [result(expected)] * 2
    histories = [(folder / "run" / "history.csv").read_text() for folder in (expected, killed)]
    assert histories[0] == histories[1]
