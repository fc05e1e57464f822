"""From a recipe to a trained model: building, compiling, fitting."""

import csv
import math
import signal
import time

import keras
from keras import ops

from keras_vit.data import Batches, DeviceBatches
from keras_vit.devices import accelerators, on_jax_accelerator
from keras_vit.model import VisionTransformer, default_augmentation

# Training steps that JAX runs on a GPU without asking the host.
STEPS_AT_ONCE = 32


def step_schedule(learning_rate, epochs, milestones):
    """A learning rate that falls to a tenth at each milestone.

    Args:
        learning_rate: float, the rate at the start.
        epochs: int, length of the run.
        milestones: floats in (0, 1), shares of the run.

    Returns:
        A function of the epoch, counted from zero, for `LearningRateScheduler`, and the list of
        epochs at which the rate falls.
    """
    falls = [round(share * epochs) for share in milestones]

    def schedule(epoch, _=None):
        return learning_rate * 0.1 ** sum(epoch >= fall for fall in falls)

    return schedule, falls


def least_memory(recipe, image_shape, images, dtype):
    """Bytes that a training step holds at the very least: tokens and attention of all blocks.

    A step of the baseline takes about half as much again.

    Args:
        recipe: a `Recipe`.
        image_shape: tuple `(H, W, C)`.
        images: int, number of training images.
        dtype: `"float32"` or `"mixed_bfloat16"`.
    """
    height, width, _ = image_shape
    tokens = (height // recipe.patch_size) * (width // recipe.patch_size) + 1
    by_block = tokens * (8 * recipe.embed_dim + 2 * recipe.mlp_dim)
    by_block += 2 * recipe.num_heads * tokens**2
    numbers = min(recipe.batch_size, images) * recipe.depth * by_block
    return numbers * (4 if dtype == "float32" else 2)


def build_model(dataset, recipe, dtype=None):
    """An untrained model, adapted to the training images.

    Args:
        dataset: a `Dataset`.
        recipe: a `Recipe`.
        dtype: dtype policy of the layers.

    Returns:
        A `VisionTransformer`.

    Raises:
        ValueError: if the recipe's sizes do not fit the images or each other.
    """
    flip = dataset.horizontal_flip
    layers = default_augmentation(dataset.image_shape, flip) if recipe.augmentation else []
    model = VisionTransformer(
        dataset.image_shape,
        len(dataset.class_names),
        patch_size=recipe.patch_size,
        embed_dim=recipe.embed_dim,
        mlp_dim=recipe.mlp_dim,
        num_heads=recipe.num_heads,
        depth=recipe.depth,
        dropout=recipe.dropout,
        augmentation=layers,
        dtype=dtype,
    )
    model.adapt(dataset.train_images)
    return model


def fit(model, dataset, recipe, seed=0, validation=None, run_dir=None, tensorboard=False):
    """Compiles and trains a model by a recipe.

    Args:
        model: a `VisionTransformer`, adapted to the training images.
        dataset: a `Dataset`.
        recipe: a `Recipe`.
        seed: int, decides the order of the images in each epoch.
        validation: pair `(images, labels)` to measure after each epoch.
        run_dir: `Path` of an existing folder for `history.csv`, `best.keras` (with `validation`)
            and TensorBoard's logs.
        tensorboard: bool, whether to write those logs.

    Returns:
        Dictionary of lists with one value per epoch: `loss`, `accuracy`, `learning_rate` and
        `seconds`, and `val_loss` and `val_accuracy` with `validation`; and a bool: whether Ctrl-C
        ended the run early.
    """
    compile_model(model, recipe)
    batches = batches_of(dataset.train_images, dataset.train_labels, recipe.batch_size, seed)
    schedule, _ = step_schedule(recipe.learning_rate, recipe.epochs, recipe.milestones)
    stopper = StopOnInterrupt()
    callbacks = [
        keras.callbacks.LambdaCallback(on_epoch_begin=lambda i, _: batches.start_epoch(i + 1)),
        keras.callbacks.LearningRateScheduler(schedule),
        EpochTimer(),
        StopOnDivergence(),
        stopper,
    ]
    if run_dir is not None:
        callbacks.append(HistoryFile(run_dir / "history.csv"))
        if validation is not None:
            best = {"monitor": "val_accuracy", "mode": "max", "save_best_only": True}
            callbacks.append(keras.callbacks.ModelCheckpoint(run_dir / "best.keras", **best))
        if tensorboard:
            callbacks.append(keras.callbacks.TensorBoard(run_dir / "tensorboard"))

    history = model.fit(
        batches,
        epochs=recipe.epochs,
        shuffle=False,
        validation_data=validation,
        validation_batch_size=recipe.batch_size,
        callbacks=callbacks,
    )
    return history.history, stopper.interrupted


def batches_of(images, labels, batch_size, seed):
    """Training batches as `Batches`, kept where the backend reads them fastest."""
    kind = DeviceBatches if on_jax_accelerator() else Batches
    return kind(images, labels, batch_size, seed)


def compile_model(model, recipe):
    """Gives a model the recipe's optimizer, the loss on logits, and accuracy."""
    # On a CPU, TensorFlow's own kernels run a training step faster than those that XLA makes.
    on_tensorflow_cpu = keras.backend.backend() == "tensorflow" and not accelerators()
    model.compile(
        optimizer=keras.optimizers.AdamW(recipe.learning_rate, weight_decay=recipe.weight_decay),
        loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False if on_tensorflow_cpu else "auto",
        steps_per_execution=STEPS_AT_ONCE if on_jax_accelerator() else 1,
    )


class EpochTimer(keras.callbacks.Callback):
    """Adds to the logs of an epoch the seconds that its training took, validation excluded."""

    def on_epoch_begin(self, epoch, logs=None):
        self._start, self._end = time.perf_counter(), None

    def on_test_begin(self, logs=None):
        self._stop()

    def on_epoch_end(self, epoch, logs=None):
        self._stop()
        logs["seconds"] = round(self._end - self._start, 3)

    def _stop(self):
        # A GPU may be steps behind the host: what the last step counted is there once it is done.
        ops.convert_to_numpy(self.model.optimizer.iterations)
        self._end = self._end or time.perf_counter()


class HistoryFile(keras.callbacks.Callback):
    """Writes what each epoch measured as a line of a CSV file, epochs counted from one."""

    def __init__(self, path):
        super().__init__()
        self.path = path

    def on_epoch_end(self, epoch, logs=None):
        row = {"epoch": epoch + 1, **logs}
        with open(self.path, "w" if epoch == 0 else "a", newline="", encoding="utf-8") as lines:
            writer = csv.DictWriter(lines, row)
            if epoch == 0:
                writer.writeheader()
            writer.writerow(row)


class StopOnDivergence(keras.callbacks.Callback):
    """Ends the training after an epoch whose loss is NaN or infinite."""

    def on_epoch_end(self, epoch, logs=None):
        if not math.isfinite(logs["loss"]):
            self.model.stop_training = True


class StopOnInterrupt(keras.callbacks.Callback):
    """Lets Ctrl-C finish the step in progress and end the training; a second one ends it at once.

    An exception in the middle of a step would leave JAX without weights: their memory was given
    to the step.
    """

    def __init__(self):
        super().__init__()
        self.interrupted = False

    def on_train_begin(self, logs=None):
        self._previous = signal.signal(signal.SIGINT, self._interrupt)

    def on_train_end(self, logs=None):
        signal.signal(signal.SIGINT, self._previous)

    def _interrupt(self, *_):
        self.interrupted = self.model.stop_training = True
        signal.signal(signal.SIGINT, self._previous)
