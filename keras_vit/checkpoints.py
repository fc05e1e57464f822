"""Checkpoints from which a training goes on as if it had never stopped.

Keras's `BackupAndRestore` overwrites its only copy in place and learns the batches of an
interrupted epoch twice; its `OrbaxCheckpoint` keeps neither the place in the epoch nor the
numbers of the epochs before. Here one file holds all of it, appears whole or not at all, and
carries a checksum.
"""

import dataclasses
import hashlib
import io
import json
import warnings

import numpy as np
from keras import ops

from keras_vit.files import whole

KEPT = 2
NAMES = "step-*.checkpoint"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A state of a training.

    Attributes:
        epoch: int, epochs that are complete.
        batch: int, batches of the next one that are learned already.
        rows: list of dictionaries, what each complete epoch measured.
        seconds: float, how long the batches of the next epoch took.
        data: string, digest of the training images and labels.
        arrays: list of NumPy arrays, one for each variable of `state_of`.
    """

    epoch: int
    batch: int
    rows: list
    seconds: float
    data: str
    arrays: list

    def assign(self, model):
        """Gives a compiled and built model of the same sizes the state of this checkpoint."""
        for variable, array in zip(state_of(model), self.arrays, strict=True):
            variable.assign(array)


def state_of(model):
    """Every variable that training changes: weights, random seeds, optimizer, running metrics."""
    return [*model.variables, *model.optimizer.variables, *model.metrics_variables]


def copy_of_state(model):
    """NumPy arrays of `state_of` that stay as they are while training goes on."""
    return [np.array(ops.convert_to_numpy(variable)) for variable in state_of(model)]


def save(folder, checkpoint):
    """Writes a checkpoint into a folder and removes all but the newest two."""
    folder.mkdir(exist_ok=True)
    place = {key: value for key, value in vars(checkpoint).items() if key != "arrays"}
    buffer = io.BytesIO()
    np.savez(
        buffer, place=json.dumps(place), **{f"{i}": x for i, x in enumerate(checkpoint.arrays)}
    )
    content = buffer.getbuffer()
    name = f"step-{checkpoint.epoch:06d}-{checkpoint.batch:08d}.checkpoint"
    with whole(folder / name) as path, open(path, "wb") as file:
        file.write(hashlib.sha256(content).digest())
        file.write(content)
    for old in sorted(folder.glob(NAMES))[:-KEPT]:
        old.unlink()


def newest(folder):
    """The newest `Checkpoint` of a folder that is whole; None where there is none.

    Damaged ones are removed, so that they do not count as the newest two.
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
            arrays = [file[f"{index}"] for index in range(len(file.files) - 1)]
        return Checkpoint(**place, arrays=arrays)
    return None
