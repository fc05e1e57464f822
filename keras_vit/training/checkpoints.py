"""Checkpoints that resume training exactly where it was interrupted.

Keras's `BackupAndRestore` overwrites its only copy in place and trains twice on the batches of an
interrupted epoch; its `OrbaxCheckpoint` saves neither the position within the epoch nor the
metrics of earlier epochs. Here one file holds all of it, is written atomically, carries a
checksum, and stores each variable by name.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import platform
import re
import warnings

import keras
import ml_dtypes  # noqa: F401  Registers `bfloat16` and the like with NumPy.
import numpy as np
from keras import ops

from keras_vit import __version__, distribution
from keras_vit.files import atomic_write

FOLDER = "checkpoints"  # In the run directory.
KEPT = 2
NAMES = "step-*.checkpoint"
NOTE = "host"  # Of the first process, which writes them.
# What `keras.optimizers.LossScaleOptimizer`, which float16 needs, adds to an optimizer.
LOSS_SCALE = "loss_scale_optimizer/"
# Most variables that an error lists.
SHOWN = 5


class DifferentVariables(Exception):
    """A checkpoint does not have the variables of the model, or lacks their names."""


class CannotExtend(DifferentVariables):
    """The model of a finished run lacks variables of the one that is to continue it."""


class NotOnFirst(distribution.DistributionError):
    """The first of several processes lacks the checkpoints of the run."""


def versions():
    """Versions of the packages that define the variables of a model and its optimizer."""
    return {"keras": keras.__version__, "keras_vit": __version__}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The state of a training run.

    Attributes:
        epoch: int, number of completed epochs.
        batch: int, number of batches of the next epoch that were already trained on.
        rows: list of dictionaries, the metrics of each completed epoch.
        seconds: float, time spent on the batches of the next epoch.
        data: string, digest of the training images and labels.
        arrays: dictionary of NumPy arrays, as `copy_of_state` returns it.
        precision: string, compute dtype of the layers, such as `"bfloat16"`.
        versions: dictionary of strings, package versions that wrote the checkpoint.
        devices: string, the devices that wrote it, such as `"1 device"`.
    """

    epoch: int
    batch: int
    rows: list
    seconds: float
    data: str
    arrays: dict
    precision: str = ""
    versions: dict = dataclasses.field(default_factory=versions)
    devices: str = "1 device"

    @property
    def last_epoch(self):
        """Index of the epoch, counted from zero, whose last batch was trained on."""
        return self.epoch if self.batch else max(self.epoch - 1, 0)

    def assign(self, model):
        """Assigns this state to a compiled and built model that has the same variables.

        Warns if the checkpoint was written by another version of Keras or of this package.

        Raises:
            DifferentVariables: if the model has different variables; it is left unchanged.
        """
        variables = _named_state(model)
        arrays = self.arrays
        if _scales_loss(variables) != _scales_loss(arrays):
            # The run resumes in another precision: the loss scale is initialized or dropped.
            variables, arrays = _without_loss_scale(variables), _without_loss_scale(arrays)
        in_model = {name: _kind(x.shape, x.dtype) for name, x in variables.items()}
        in_checkpoint = {name: _kind(x.shape, x.dtype.name) for name, x in arrays.items()}
        if differences := _differences(in_checkpoint, in_model):
            raise DifferentVariables(
                f"the variables of the checkpoint differ from those of the model: {differences}"
            )
        if self.versions != versions():
            written, now = (
                " and ".join(f"{name} {version}" for name, version in group.items())
                for group in (self.versions, versions())
            )
            warnings.warn(
                f"the checkpoint was written by {written}, and is resumed with {now}: results may "
                "differ from those of an uninterrupted run",
                stacklevel=2,
            )
        for name, variable in variables.items():
            variable.assign(arrays[name])


def _scales_loss(names):
    return any(name.startswith(LOSS_SCALE) for name in names)


def _without_loss_scale(state):
    return {name: value for name, value in state.items() if not name.startswith(LOSS_SCALE)}


def state_of(model):
    """All variables that training updates: weights, seeds, optimizer state, running metrics."""
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]


def copy_of_state(model):
    """Copies of the variables of `state_of`, as NumPy arrays by name."""
    return {
        name: np.array(ops.convert_to_numpy(variable))
        for name, variable in _named_state(model).items()
    }


def _named_state(model):
    """The variables of `state_of`, by names that are the same in every process.

    A name is a variable's path. Keras numbers unnamed layers within the process, such as
    `seed_generator_7`; here they are numbered within the model.
    """
    known, references, state = {}, {}, {}

    def renumbered(path):
        name = ""
        for part in path.split("/"):
            kind = name + re.sub(r"_\d+$", "", part)
            alike = known.setdefault(kind, {})
            number = alike.setdefault(part, len(alike))
            name = f"{kind}_{number}/" if number else f"{kind}/"
        return name[:-1]

    for variable in model.variables:
        references[variable.path.replace("/", "_")] = renumbered(variable.path)
    for variable in state_of(model):
        # The name of an optimizer's slot starts with the path of its variable.
        parent, _, name = variable.path.rpartition("/")
        matches = [x for x in references if name.startswith(f"{x}_")]
        reference = max(matches, key=len, default=None)
        if reference is None:
            name = renumbered(variable.path)
        else:
            name = f"{renumbered(parent)}/{references[reference]}{name[len(reference) :]}"
        while name in state:  # Layers of the same name in different nested models.
            name += "'"
        state[name] = variable
    return state


def extend(parent, model):
    """Continues training from the weights and the optimizer of a finished run's model.

    Random seeds, which Keras does not save, are not continued.

    Args:
        parent: a compiled model, as a run saves it.
        model: a compiled model of the same architecture and optimizer, which is changed.

    Raises:
        CannotExtend: if the parent has no optimizer or other classes, or lacks a variable of the
            model.
    """
    if getattr(parent, "optimizer", None) is None:
        raise CannotExtend("the model to extend was saved without its optimizer")
    if parent.class_names != model.class_names:
        raise CannotExtend("the classes of the data differ from those of the model to extend")
    arrays = copy_of_state(parent)
    restarted = {"learning_rate", "seed_generator_state"}
    metrics = {id(x) for x in model.metrics_variables}
    state = {
        name: variable
        for name, variable in _named_state(model).items()
        if id(variable) not in metrics and variable.name not in restarted
    }
    in_model = {name: _kind(x.shape, x.dtype) for name, x in state.items()}
    in_parent = {name: _kind(x.shape, x.dtype.name) for name, x in arrays.items() if name in state}
    if differences := _differences(in_parent, in_model):
        raise CannotExtend(f"the variables of the model to extend differ: {differences}")
    for name, variable in state.items():
        variable.assign(arrays[name])


def _kind(shape, dtype):
    return f"{tuple(shape)} {dtype}"


def _differences(in_checkpoint, in_model):
    """How the variables of a checkpoint differ from those of a model; empty if they agree."""
    names = {**in_checkpoint, **in_model}
    names = [name for name in names if in_checkpoint.get(name) != in_model.get(name)]
    shown = [
        f"{name} is {in_checkpoint.get(name, 'missing')} in the checkpoint and "
        f"{in_model.get(name, 'missing')} in the model"
        for name in names[:SHOWN]
    ]
    rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "; ".join(shown + rest)


def save(folder, checkpoint):
    """Writes a checkpoint into a folder and removes all but the newest two."""
    folder.mkdir(exist_ok=True)
    metadata = {key: value for key, value in vars(checkpoint).items() if key != "arrays"}
    metadata["variables"] = [(name, x.dtype.name) for name, x in checkpoint.arrays.items()]
    arrays = {f"{i}": _storable(x) for i, x in enumerate(checkpoint.arrays.values())}
    buffer = io.BytesIO()
    np.savez(buffer, place=json.dumps(metadata), **arrays)
    content = buffer.getbuffer()
    name = f"step-{checkpoint.epoch:06d}-{checkpoint.batch:08d}.checkpoint"
    with atomic_write(folder / name) as path, open(path, "wb") as file:
        file.write(hashlib.sha256(content).digest())
        file.write(content)
    for old in sorted(folder.glob(NAMES))[:-KEPT]:
        old.unlink()


def _storable(array):
    """An array in a dtype that .npy files support: `bfloat16` and the like as integers."""
    is_native = np.dtype(array.dtype.str) == array.dtype
    return array if is_native else array.view(f"u{array.itemsize}")


def newest(folder):
    """The newest intact `Checkpoint` of a folder; None if there is none.

    Damaged ones are removed, so that they do not count towards the two that are kept.

    Raises:
        DifferentVariables: if it is from a version that did not store the names of variables.
    """
    path, content = _newest_intact(folder)
    return _read(content, path) if path else None


def newest_of_first(folder):
    """The newest intact `Checkpoint` in a folder of the first process, for all processes.

    Raises:
        DifferentVariables: if it is from a version that did not store the names of variables.
    """
    path, content = _newest_intact(folder) if distribution.is_first() else (None, b"")
    content = distribution.broadcast(content)
    return _read(content, path or folder) if content else None


def note(folder, host):
    """Notes in a process that writes no checkpoints on which host the first process does."""
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / NOTE).write_text(host, encoding="utf-8")


def check_first(folder):
    """Raises a `NotOnFirst` if the first process lacks a checkpoint that any process knows of.

    Args:
        folder: `Path`, on a disk that the processes share or on one of this process.
    """
    path = folder / NOTE
    known = path.read_text(encoding="utf-8") if path.exists() else ""
    rows = distribution.gather(json.dumps([platform.node(), any(folder.glob(NAMES)), known]))
    rows = [json.loads(row) for row in rows]
    first, has_one, _ = rows[0]
    if has_one:
        return
    for index, (host, has_one, known) in enumerate(rows):
        # A run that ended before its first checkpoint was complete starts over.
        if has_one or known not in ("", first):
            there = (
                f"process {index} on {host} has one" if has_one else f"one was written on {known}"
            )
            raise NotOnFirst(
                f"process 0 on {first} has no checkpoint in {folder}, but {there}: start process 0 "
                "there, or copy the folder of the run"
            )


def _newest_intact(folder):
    """The path and the content of the newest intact checkpoint; None and nothing without one."""
    for path in sorted(folder.glob(NAMES), reverse=True):
        content = path.read_bytes()
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            warnings.warn(f"{path} is damaged: resuming from the previous checkpoint", stacklevel=2)
            path.unlink()
            continue
        return path, content
    return None, b""


def _read(content, path):
    """The `Checkpoint` that a file holds, after its digest."""
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
        metadata = json.loads(str(file["place"]))
        if "variables" not in metadata:
            raise DifferentVariables(
                f"{path} was written by an older version of keras_vit, which did not store the "
                "names of the variables"
            )
        arrays = {
            name: file[f"{index}"].view(dtype)
            for index, (name, dtype) in enumerate(metadata.pop("variables"))
        }
    return Checkpoint(**metadata, arrays=arrays)
