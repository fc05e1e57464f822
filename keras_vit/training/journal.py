"""The callback that writes the history, the best model and the checkpoints of a run."""

import concurrent.futures
import contextlib
import csv
import math
import platform
import signal
import threading
import time

import keras
from keras import ops

from keras_vit import distribution
from keras_vit.devices import accelerators
from keras_vit.files import atomic_write
from keras_vit.messages import is_terminal
from keras_vit.training import checkpoints

# Files of a run directory.
HISTORY, TIMING, BEST_MODEL = "history.csv", "timing.csv", "best.keras"


class Interrupted(Exception):
    """A signal stopped training between two steps; `status` is the exit status for it."""

    def __init__(self, number, epoch, batch):
        place = f"in epoch {epoch + 1}, batch {batch}" if batch else f"after epoch {epoch}"
        super().__init__(f"Stopped {place}; progress saved.")
        self.status = 128 + number


class Diverged(Exception):
    """The loss became NaN or infinite."""


class DifferentData(Exception):
    """A checkpoint was made with different training images or labels."""


def read_history(run_dir):
    """The metrics of each epoch of a run: lists of floats by the columns of `history.csv`."""
    with open(run_dir / HISTORY, newline="", encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    measured = [name for name in rows[0] if name not in ("epoch", "precision")]
    return {name: [float(row[name]) for row in rows] for name in measured}


class Journal(keras.callbacks.Callback):
    """The callback that writes the history and the checkpoints of a run, and resumes it.

    It writes `history.csv`, `timing.csv`, `best.keras` and `checkpoints`. Checkpoints are taken
    between two steps; with a GPU, they are written in the background. If several processes train
    together, each of them has a journal, and the first one's writes.

    Args:
        model: a `VisionTransformer` from `compile_model`; if the run has a checkpoint, the model is
            restored from it.
        batches: `Batches` that are passed to `fit`.
        run_dir: `Path` of the run's folder; None to write nothing.
        save_every: int, minimum number of steps between checkpoints within an epoch; None for
            no checkpoints there.
        data: string, digest of the training images and labels.
        costs: list of numbers, relative cost of each epoch of the run.
        checkpoint: `Checkpoint` of the run to resume from; None to start.
        early_stopping: int, epochs without a better `val_accuracy` after which training stops;
            None for never.
        small_until: int, number of epochs of progressive resizing, in which it never stops.

    Raises:
        DifferentData: if the run has a checkpoint with a different digest.

    Attributes:
        rows: list of dictionaries, the metrics of each completed epoch.
        epoch: int, number of completed epochs.
        skipped: int, batches of the next epoch that an earlier process has trained on.
    """

    def __init__(
        self,
        model,
        batches,
        run_dir=None,
        save_every=None,
        data="",
        costs=(1,),
        checkpoint=None,
        early_stopping=None,
        small_until=0,
    ):
        super().__init__()
        self.data, self.costs, self.early_stopping = data, costs, early_stopping
        self.small_until = small_until
        self._precision = model.get_layer("norm").compute_dtype
        self.run_dir = run_dir if distribution.is_first() else None
        self._notes = (
            None if distribution.is_first() or not run_dir else run_dir / checkpoints.FOLDER
        )
        self._first_host = distribution.gather(platform.node())[0]
        self.batches, self.save_every = batches, save_every
        self.rows, self.epoch, self.skipped, self._spent = [], 0, 0, 0.0
        self._total, self._signals, self._steps = batches.num_batches, [], 0
        self._last = checkpoint
        self._writer = concurrent.futures.ThreadPoolExecutor(max_workers=1)
        self._written = self._writer.submit(int)  # Nothing yet.
        # Reading the loss at every step would stall a GPU.
        self._checks_each_step = not accelerators()
        self._first_step = None  # Work done by the end of the first step, and the time then.
        self._printed_time_left = False
        if self._last:
            if self._last.data != data:
                raise DifferentData(
                    f"the checkpoint in {run_dir} was made with different training images or labels"
                )
            self._last.assign(model)
            self.rows, self.epoch = self._last.rows, self._last.epoch
            self.skipped, self._spent = self._last.batch, self._last.seconds
            before = self._last.precision
            if before and before != self._precision:
                print(f"Resuming in {self._precision}; the checkpoint was written in {before}.")
                if self.skipped:  # The epoch is trained in both.
                    self._precision = f"{before}+{self._precision}"
            if self._last.devices != distribution.topology():
                print(
                    f"Resuming on {distribution.topology()}; the checkpoint was written on "
                    f"{self._last.devices}."
                )
            if self.run_dir:
                _write_tables(self.run_dir, self.rows)

    def start_epoch(self, epoch):
        """Starts an epoch, counted from zero; must be called before the other callbacks."""
        if self._last and self.skipped:
            self._last.assign(self.model)  # Keras has reset the running metrics.
        self.batches.start_epoch(epoch + 1, self.skipped)
        self._done = self.skipped
        self._start, self._end = time.perf_counter(), math.inf

    def on_train_batch_end(self, batch, logs):
        # With several steps per dispatch, the batch index may be beyond the end.
        before, self._done = self._done, min(self.skipped + batch + 1, self._total)
        if self._written.done():
            self._written.result()  # Raises the error of a failed write.
        self._steps += 1
        if distribution.stops_after(self._steps):
            self._signals.append(signal.SIGTERM)
        due = self.save_every and self._done // self.save_every > before // self.save_every
        saves = (self._signals or due) and self._done < self._total
        if saves or self._checks_each_step:
            self._check(logs)
        self._print_time_left()
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
        self.rows.append({**row, "seconds": seconds})
        if not is_terminal():
            print(_line(self.rows[-1], len(self.costs)), flush=True)
        self.epoch, self.skipped, self._spent, self._last = epoch + 1, 0, 0.0, None
        if self.run_dir and "val_accuracy" in row and self._best_epoch() == self.epoch:
            # Keras makes variables while it saves, in this process alone.
            with atomic_write(self.run_dir / BEST_MODEL) as path, distribution.suspended():
                self.model.save(path)
        self._save(0)
        self._stop_on_signal(0)
        if self.stopped_early:
            best = self._best_epoch()
            print(
                f"Stopped early after epoch {self.epoch}: val_accuracy was best in epoch {best}, "
                f"whose model is {BEST_MODEL}.",
                flush=True,
            )
            self.model.stop_training = True

    @property
    def stopped_early(self):
        """Whether the last epochs were no better; read from the rows, so that it is resumed."""
        if not (self.early_stopping and self.rows):
            return False
        return self.epoch - max(self._best_epoch(), self.small_until) >= self.early_stopping

    def _best_epoch(self):
        """The first epoch with the highest `val_accuracy`, counted from one."""
        return 1 + max(range(len(self.rows)), key=lambda i: self.rows[i].get("val_accuracy", 0))

    @contextlib.contextmanager
    def running(self):
        """Context of `fit`: defers signals to the end of a step, and waits for pending writes.

        Raises the error of a checkpoint that could not be written.
        """
        try:
            with self._deferred_signals():
                yield
        finally:
            self._writer.shutdown()
            self._written.result()

    @contextlib.contextmanager
    def _deferred_signals(self):
        """Defers SIGINT and SIGTERM to the end of a step; a second signal acts at once.

        An exception in the middle of a step would leave JAX without weights, because their
        buffers are donated to the step. Several processes have to stop after the same step: JAX
        handles SIGTERM there, and finds it.
        """
        previous = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        # Handlers that were not installed from Python cannot be restored.
        previous = {number: handler for number, handler in previous.items() if handler is not None}
        several = distribution.processes() > 1
        if several:
            previous.pop(signal.SIGTERM, None)

        def defer(number, _):
            signal.signal(number, previous[number])
            if several:
                signal.raise_signal(signal.SIGTERM)
            else:
                self._signals.append(number)

        if threading.current_thread() is not threading.main_thread():
            yield  # Python handles signals in its main thread only.
            return
        try:
            for number in previous:
                signal.signal(number, defer)
            yield
            self._stop_on_signal(0)
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _save(self, batch):
        if self._notes:
            checkpoints.note(self._notes, self._first_host)
        if not self.run_dir:
            return
        if keras.backend.backend() == "jax":
            self.model.jax_state_sync()  # Between steps, the variables are out of date.
        seconds = self._spent + time.perf_counter() - self._start if batch else 0.0
        progress = self.epoch, batch, list(self.rows), seconds, self.data
        self._written.result()  # One at a time.
        state = checkpoints.copy_of_state(self.model)
        checkpoint = checkpoints.Checkpoint(
            *progress, state, self._precision, devices=distribution.topology()
        )
        if accelerators():
            self._written = self._writer.submit(_write, self.run_dir, checkpoint)
        else:
            # On a CPU, a tenth of a second per epoch does not matter, while a background copy slows
            # TensorFlow's steps down by up to half.
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
                f"training diverged at a learning rate of {self._learning_rate():g}. Try a smaller "
                "one"
            )

    def _print_time_left(self):
        """Prints the estimated time left once, after a minute or the first epoch."""
        if self._printed_time_left:
            return
        now = time.perf_counter()
        done = sum(self.costs[: self.epoch]) + self.costs[self.epoch] * self._done / self._total
        if self._first_step is None:  # It includes compilation; the later ones are timed.
            self._first_step = done, now
            return
        first, start = self._first_step
        if now - start < 60 and self._done < self._total or done == first:
            return
        self._printed_time_left = True
        left = (sum(self.costs) - done) * (now - start) / (done - first)
        if left > 60:
            start = "\n" if is_terminal() else ""  # The progress bar leaves its line open.
            print(f"{start}About {duration(left)} of training left.", flush=True)

    def _learning_rate(self):
        return float(ops.convert_to_numpy(self.model.optimizer.learning_rate))

    def _stop_clock(self):
        # A GPU may lag behind the host: reading the step counter waits for the last step.
        ops.convert_to_numpy(self.model.optimizer.iterations)
        self._end = min(self._end, time.perf_counter())


def duration(seconds):
    """A duration in words, such as "3 minutes" or "2.5 hours"."""
    minutes = max(1, round(seconds / 60))
    if minutes >= 90:
        return f"{minutes / 60:.1f} hours"
    return f"{minutes} minute{'s' if minutes > 1 else ''}"


def _line(row, epochs):
    """The metrics of an epoch as a line of a log."""
    shown = [
        f"{name} {value:.4g}"
        for name, value in row.items()
        if name not in ("epoch", "precision", "seconds")
    ]
    return f"Epoch {row['epoch']}/{epochs}: {', '.join(shown)}, {row['seconds']:.1f} s"


def _write(run_dir, checkpoint):
    checkpoints.save(run_dir / checkpoints.FOLDER, checkpoint)
    if not checkpoint.batch:
        _write_tables(run_dir, checkpoint.rows)


def _write_tables(run_dir, rows):
    """Writes `history.csv`, which is the same for every repetition of a run, and `timing.csv`."""
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
