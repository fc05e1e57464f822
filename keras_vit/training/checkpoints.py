"""Checkpoints from which a training goes on as if it had never stopped.

Keras's `BackupAndRestore` overwrites its only copy in place and learns the batches of an
interrupted epoch twice; its `OrbaxCheckpoint` keeps neither the place in the epoch nor the
numbers of the epochs before. Here one file holds all of it, appears whole or not at all, carries
a checksum, and knows the name of each variable.
"""

import dataclasses
import hashlib
import io
import json
import re
import warnings

import keras
import ml_dtypes  # noqa: F401  NumPy knows `bfloat16` and the like by name then.
import numpy as np
from keras import ops

from keras_vit import __version__
from keras_vit.files import atomic_write

FOLDER = "checkpoints"  # In the run directory.
KEPT = 2
NAMES = "step-*.checkpoint"
# What `keras.optimizers.LossScaleOptimizer`, which float16 needs, adds to an optimizer.
LOSS_SCALE = "loss_scale_optimizer/"
# How many variables an error names.
SHOWN = 5


class OtherVariables(Exception):
    """A checkpoint lacks the names of its variables, or holds variables of another model."""


def versions():
    """The versions that decide which variables a model and its optimizer have."""
    return {"keras": keras.__version__, "keras_vit": __version__}


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state of a training.

    Attributes:
        epoch: int, epochs that are complete.
        batch: int, batches of the next one that are learned already.
        rows: list of dictionaries, what each complete epoch measured.
        seconds: float, how long the batches of the next epoch took.
        data: string, digest of the training images and labels.
        arrays: dictionary of NumPy arrays, as `copy_of_state` returns it.
        precision: string, what the layers computed in, such as `"bfloat16"`.
        versions: dictionary of strings, the versions that wrote the checkpoint.
    """

    epoch: int
    batch: int
    rows: list
    seconds: float
    data: str
    arrays: dict
    precision: str = ""
    versions: dict = dataclasses.field(default_factory=versions)

    def assign(self, model):
        """Gives a compiled and built model of the same variables the state of this checkpoint.

        Warns if another version of Keras or of this package wrote it.

        Raises:
            OtherVariables: if the model has other variables; it keeps its state then.
        """
        variables = _named_state(model)
        arrays = self.arrays
        if _scales_loss(variables) != _scales_loss(arrays):
            # The run resumes in another precision, and the loss scale starts anew or is dropped.
            variables, arrays = _without_loss_scale(variables), _without_loss_scale(arrays)
        here = {name: _kind(x.shape, x.dtype) for name, x in variables.items()}
        there = {name: _kind(x.shape, x.dtype.name) for name, x in arrays.items()}
        if differences := _differences(there, here):
            raise OtherVariables(
                f"the checkpoint has other variables than the model: {differences}"
            )
        if self.versions != versions():
            written, now = (
                " and ".join(f"{name} {version}" for name, version in group.items())
                for group in (self.versions, versions())
            )
            warnings.warn(
                f"the checkpoint was written by {written}, and is resumed with {now}: results may "
                "differ from those of a run that was never stopped",
                stacklevel=2,
            )
        for name, variable in variables.items():
            variable.assign(arrays[name])


def _scales_loss(names):
    return any(name.startswith(LOSS_SCALE) for name in names)


def _without_loss_scale(state):
    return {name: value for name, value in state.items() if not name.startswith(LOSS_SCALE)}


def state_of(model):
    """Every variable that training changes: weights, random seeds, optimizer, running metrics."""
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]


def copy_of_state(model):
    """NumPy arrays of `state_of`, by name, that stay as they are while training goes on."""
    return {
        name: np.array(ops.convert_to_numpy(variable))
        for name, variable in _named_state(model).items()
    }


def _named_state(model):
    """The variables of `state_of`, by names that are the same in every process.

    A name is a variable's path. Keras numbers what has no name of its own by how many of a kind
    the process has made, such as `seed_generator_7`: here, by how many of them the model has.
    """
    known, references, state = {}, {}, {}

    def counted_anew(path):
        name = ""
        for part in path.split("/"):
            kind = name + re.sub(r"_\d+$", "", part)
            alike = known.setdefault(kind, {})
            number = alike.setdefault(part, len(alike))
            name = f"{kind}_{number}/" if number else f"{kind}/"
        return name[:-1]

    for variable in model.variables:
        references[variable.path.replace("/", "_")] = counted_anew(variable.path)
    for variable in state_of(model):
        # An optimizer's name for what it keeps of a variable starts with that one's path.
        place, _, name = variable.path.rpartition("/")
        found = [x for x in references if name.startswith(f"{x}_")]
        reference = max(found, key=len, default=None)
        if reference is None:
            name = counted_anew(variable.path)
        else:
            name = f"{counted_anew(place)}/{references[reference]}{name[len(reference) :]}"
        while name in state:  # Of layers of one name in several nested models.
            name += "'"
        state[name] = variable
    return state


def _kind(shape, dtype):
    return f"{tuple(shape)} {dtype}"


def _differences(there, here):
    """What tells the variables of a checkpoint from those of a model; empty if nothing does."""
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    shown = [
        f"{name} is {there.get(name, 'missing')} in the checkpoint and "
        f"{here.get(name, 'missing')} in the model"
        for name in names[:SHOWN]
    ]
    rest = [f"and {len(names) - SHOWN} more"] if len(names) > SHOWN else []
    return "; ".join(shown + rest)


def save(folder, checkpoint):
    """Writes a checkpoint into a folder and removes all but the newest two."""
    folder.mkdir(exist_ok=True)
    place = {key: value for key, value in vars(checkpoint).items() if key != "arrays"}
    place["variables"] = [(name, x.dtype.name) for name, x in checkpoint.arrays.items()]
    arrays = {f"{i}": _storable(x) for i, x in enumerate(checkpoint.arrays.values())}
    buffer = io.BytesIO()
    np.savez(buffer, place=json.dumps(place), **arrays)
    content = buffer.getbuffer()
    name = f"step-{checkpoint.epoch:06d}-{checkpoint.batch:08d}.checkpoint"
    with atomic_write(folder / name) as path, open(path, "wb") as file:
        file.write(hashlib.sha256(content).digest())
        file.write(content)
    for old in sorted(folder.glob(NAMES))[:-KEPT]:
        old.unlink()


def _storable(array):
    """An array whose type a file of NumPy's can tell: `bfloat16` and the like as whole numbers."""
    is_known = np.dtype(array.dtype.str) == array.dtype
    return array if is_known else array.view(f"u{array.itemsize}")


def newest(folder):
    """The newest `Checkpoint` of a folder that is whole; None where there is none.

    Damaged ones are removed, so that they do not count as the newest two.

    Raises:
        OtherVariables: if it is from a version that did not note the names of its variables.
    """
    for path in sorted(folder.glob(NAMES), reverse=True):
        content = path.read_bytes()
        digest, content = content[:32], content[32:]
        if hashlib.sha256(content).digest() != digest:
            warnings.warn(f"{path} is damaged, going on from the one before it", stacklevel=2)
            path.unlink()
            continue
        with np.load(io.BytesIO(content), allow_pickle=False) as file:
            place = json.loads(str(file["place"]))
            if "variables" not in place:
                raise OtherVariables(
                    f"{path} was written by an older version of keras_vit, which did not note the "
                    "names of the variables"
                )
            arrays = {
                name: file[f"{index}"].view(dtype)
                for index, (name, dtype) in enumerate(place.pop("variables"))
            }
        return Checkpoint(**place, arrays=arrays)
    return None
