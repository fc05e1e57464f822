"""What a run keeps of its training while it goes: its history, its best model, its checkpoints."""

import concurrent.futures
import contextlib
import csv
import math
import signal
import threading
import time

import keras
from keras import ops

from keras_vit.devices import accelerators
from keras_vit.files import atomic_write
from keras_vit.training import checkpoints

# Files of a run directory.
HISTORY, TIMING, BEST_MODEL = "history.csv", "timing.csv", "best.keras"


class Interrupted(Exception):
    """A signal ended the training between two steps; `status` is what a shell expects then."""

    def __init__(self, number, epoch, batch):
        super().__init__(
            f"{signal.Signals(number).name} after {epoch} epochs and {batch} batches of the next"
        )
        self.status = 128 + number


class Diverged(Exception):
    """The loss became NaN or infinite."""


class OtherData(Exception):
    """A run was begun with other training images or labels than it shall go on with."""


def read_history(run_dir):
    """What each epoch of a run measured: lists of floats by the columns of its `history.csv`."""
    with open(run_dir / HISTORY, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    measured = [name for name in rows[0] if name not in ("epoch", "precision")]
    return {name: [float(row[name]) for row in rows] for name in measured}


class Journal(keras.callbacks.Callback):
    """Writes `history.csv`, `timing.csv`, `best.keras` and checkpoints of a run, and continues it.

    Checkpoints are made between two steps; with a GPU, they are written while training goes on.

    Args:
        model: a `VisionTransformer` from `compile_model`; if the run has a checkpoint, it takes its
            state.
        batches: `Batches` that `fit` gets.
        run_dir: `Path` of the run's folder; None to write nothing.
        save_every: int, least number of steps between checkpoints inside of an epoch; None for
            none.
        data: string, digest of the training images and labels.
        epochs: int, length of the run.

    Raises:
        OtherData: if the run has a checkpoint with another digest.

    Attributes:
        rows: list of dictionaries, what each complete epoch measured.
        epoch: int, how many epochs are complete.
        skipped: int, how many batches of the next one were learned by an earlier process.
    """

    def __init__(self, model, batches, run_dir=None, save_every=None, data="", epochs=1):
        super().__init__()
        self.data, self.epochs = data, epochs
        self._precision = model.get_layer("norm").compute_dtype
        self.batches, self.run_dir, self.save_every = batches, run_dir, save_every
        self.rows, self.epoch, self.skipped, self._spent = [], 0, 0, 0.0
        self._total, self._signals = batches.num_batches, []
        self._last = run_dir and checkpoints.newest(run_dir / checkpoints.FOLDER)
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._written = self._writer.submit(int)  # Nothing yet.
        # A GPU would wait for the host at each look.
        self._looks_at_each_step = not accelerators()
        self._first_step = None  # How many steps of the run were done then, and the time.
        self._told_time_left = False
        if self._last:
            if self._last.data != data:
                raise OtherData(f"{run_dir} was begun with other training images or labels")
            self._last.assign(model)
            self.rows, self.epoch = self._last.rows, self._last.epoch
            self.skipped, self._spent = self._last.batch, self._last.seconds
            before = self._last.precision
            if before and before != self._precision:
                print(f"Resuming in {self._precision}; the checkpoint was written in {before}.")
                if self.skipped:  # The epoch will have seen both.
                    self._precision = f"{before}+{self._precision}"
            _write_tables(run_dir, self.rows)

    def start_epoch(self, epoch):
        """To be called when an epoch, counted from zero, begins, before other callbacks."""
        if self._last and self.skipped:
            self._last.assign(self.model)  # The running metrics were reset since.
        self.batches.start_epoch(epoch + 1, self.skipped)
        self._done = self.skipped
        self._start, self._end = time.perf_counter(), math.inf

    def on_train_batch_end(self, batch, logs):
        # The number of the last of several steps at once may be beyond the end.
        before, self._done = self._done, min(self.skipped + batch + 1, self._total)
        if self._written.done():
            self._written.result()  # Raises what kept a checkpoint from being written.
        # Several steps may be done at once.
        due = self.save_every and self._done // self.save_every > before // self.save_every
        saves = (self._signals or due) and self._done < self._total
        if saves or self._looks_at_each_step:
            self._check(logs)
        self._tell_time_left()
        if saves:
            self._save(self._done)
        if self._done >= self._total:
            return
        self._stop_on_signal(self._done)

    def on_test_begin(self, logs=None):
        self._stop_clock()

    def on_epoch_end(self, epoch, logs):
        self._stop_clock()
        self._check(logs)
        seconds = round(self._spent + self._end - self._start, 3)
        row = {"epoch": epoch + 1, **{key: float(value) for key, value in logs.items()}}
        row.setdefault("learning_rate", self._learning_rate())
        row["precision"] = self._precision
        self._precision = self.model.get_layer("norm").compute_dtype
        is_best = all(row.get("val_accuracy", 0) > old.get("val_accuracy", 0) for old in self.rows)
        self.rows.append({**row, "seconds": seconds})
        self.epoch, self.skipped, self._spent, self._last = epoch + 1, 0, 0.0, None
        if self.run_dir and "val_accuracy" in row and is_best:
            with atomic_write(self.run_dir / BEST_MODEL) as path:
                self.model.save(path)
        self._save(0)
        self._stop_on_signal(0)

    @contextlib.contextmanager
    def at_work(self):
        """To be around `fit`: signals wait for the end of a step, the end for what is written.

        Raises what went wrong while a checkpoint was written.
        """
        try:
            with self._watching_signals():
                yield
        finally:
            self._writer.shutdown()
            self._written.result()

    @contextlib.contextmanager
    def _watching_signals(self):
        """Lets SIGINT and SIGTERM wait for the end of a step; a second one does not wait for it.

        An exception in the middle of a step would leave JAX without weights: their memory was
        given to the step.
        """
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # Handlers that are not Python's could not be put back.
        previous = {number: handler for number, handler in previous.items() if handler is not None}

        def note(number, _):
            self._signals.append(number)
            signal.signal(number, previous[number])

        if threading.current_thread() is not threading.main_thread():
            yield  # Python handles signals in its main thread alone.
            return
        try:
            for number in previous:
                signal.signal(number, note)
            yield
            self._stop_on_signal(0)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _save(self, batch):
        if not self.run_dir:
            return
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # Between steps, the variables lie behind.
        seconds = self._spent + time.perf_counter() - self._start if batch else 0.0
        place = self.epoch, batch, list(self.rows), seconds, self.data
        self._written.result()  # One at a time.
        state = checkpoints.copy_of_state(self.model)
        checkpoint = checkpoints.Checkpoint(*place, state, self._precision)
        if accelerators():
            self._written = self._writer.submit(_write, self.run_dir, checkpoint)
        else:
            # An epoch takes so long there that a tenth of a second is nothing, and copies that live
            # beside the steps cost TensorFlow up to half its speed.
            _write(self.run_dir, checkpoint)

    def _stop_on_signal(self, batch):
        if self._signals:
            raise Interrupted(self._signals[0], self.epoch, batch)

    def _check(self, logs):
        loss = float(logs["loss"])
        if not math.isfinite(loss):
            raise Diverged(
                f"the loss is {loss} in epoch {self.epoch + 1}, step {self._done} of "
                f"{self._total}: "
                f"training diverged at a learning rate of {self._learning_rate():g}, try a smaller "
                "one"
            )

    def _tell_time_left(self):
        """Says once, after a minute or the first epoch, how long the rest will take."""
        if self._told_time_left:
            return
        now, steps = time.perf_counter(), self.epoch * self._total + self._done
        if self._first_step is None:  # It was compiled; the others tell how long a step takes.
            self._first_step = steps, now
            return
        first, start = self._first_step
        if now - start < 60 and self._done < self._total or steps == first:
            return
        self._told_time_left = True
        left = (self.epochs * self._total - steps) * (now - start) / (steps - first)
        if left > 60:
            print(f"\nAbout {duration(left)} of training left.", flush=True)

    def _learning_rate(self):
        return float(ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _stop_clock(self):
        # A GPU may be steps behind the host: what the last step counted is there once it is done.
        ops.convert_to_numpy(self.model.optimizer.iterations)
        self._end = min(self._end, time.perf_counter())


def duration(seconds):
    """A span of time in words, such as "3 minutes" or "2.5 hours"."""
    minutes = max(1, round(seconds / 60))
    if minutes >= 90:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


def _write(run_dir, checkpoint):
    checkpoints.save(run_dir / checkpoints.FOLDER, checkpoint)
    if not checkpoint.batch:
        _write_tables(run_dir, checkpoint.rows)


def _write_tables(run_dir, rows):
    """Times stand apart: everything in `history.csv` is the same however a run came about."""
    if not rows:
        return
    measured = [key for key in rows[0] if key != "seconds"]
    for name, columns in ((HISTORY, measured), (TIMING, ("epoch", "seconds"))):
        with (
            atomic_write(run_dir / name) as path,
            open(path, "w", newline="", encoding="utf-8") as lines,
        ):
            writer = csv.DictWriter(lines, columns, extrasaction="ignore")
            writer.writeheader()
            writer.writerows(rows)
