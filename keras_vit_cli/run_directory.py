"""The folder of a run: what lies where, and whether a run may start or resume there."""

import contextlib
import json
import math
import pathlib
import tempfile

from keras_vit.data import is_folder
from keras_vit.data.dataset import digest
from keras_vit.files import (
    CHECKSUMS,
    CONFIG,
    PARTS,
    RunLocked,
    is_output,
    locked,
    visible,
    write_checksums,
    write_json,
)
from keras_vit.loading import ModelError, check_archive
from keras_vit.training import (
    BEST_MODEL,
    CHECKPOINT_NAMES,
    CHECKPOINT_NOTE,
    CHECKPOINTS,
    HISTORY,
    TIMING,
    DifferentVariables,
)
from keras_vit.training.checkpoints import newest
from keras_vit_cli.errors import CommandError, failed_write
from keras_vit_cli.settings import LANGUAGES, current_names

# Settings that may change when a run resumes.
MAY_CHANGE = {
    *("data_dir", "figures_dir", "language", "output"),
    *("precision", "save_every", "tensorboard"),
}


class RunDirectory:
    """A run directory, by its path.

    Args:
        path: string or `Path`; nothing is made there before `prepared`.
    """

    def __init__(self, path):
        self.path = pathlib.Path(path)
        self.config = self.path / CONFIG
        self.metrics = self.path / "metrics.json"
        self.model = self.path / "model.keras"
        self.report = self.path / "report.html"
        self.page = self.path / "page.html"
        self.predictions = self.path / "predictions.csv"
        self.figures = self.path / "figures"
        self.best_model = self.path / BEST_MODEL
        self.checkpoints = self.path / CHECKPOINTS
        self._of_one_run = (
            *(self.metrics, self.report, self.best_model),
            *(self.report_in(language) for language in LANGUAGES),
            *(self.page, *(self.page_in(language) for language in LANGUAGES)),
            *(self.path / HISTORY, self.path / TIMING),
        )

    def __str__(self):
        return str(self.path)

    @classmethod
    def model_of(cls, path):
        """The model of a run directory; any other path as it is."""
        model = cls(path).model
        return model if model.is_file() else path

    def report_in(self, language, own=None):
        """The path of the report in a language: `report.html` in the run's own."""
        return self.report if language == own else self.path / f"report.{language}.html"

    def page_in(self, language, own=None):
        """The path of the page in a language: `page.html` in the run's own."""
        return self.page if language == own else self.path / f"page.{language}.html"

    @classmethod
    def of(cls, settings):
        """The run directory that settings name, or the default one."""
        name = settings.dataset
        if name.endswith(".npz"):
            name = pathlib.Path(name).stem
        elif is_folder(name):
            name = pathlib.Path(name).expanduser().resolve().name
        name = name.replace("/", "_").replace(":", "_")
        default = f"runs/{name}-{settings.recipe}-seed{settings.seed}"
        return cls(settings.output or default)

    @property
    def has_checkpoint(self):
        return any(self.checkpoints.glob(CHECKPOINT_NAMES))

    @property
    def is_finished(self):
        return self.metrics.exists() and not self.has_checkpoint

    def check(self, overwrite):
        """Raises a `CommandError` if nothing can be written, or a finished run would be lost."""
        check_writable(self.path, "--output")
        if self.is_finished and not overwrite:
            raise CommandError(
                f"{self} holds a finished run: choose another folder with --output, "
                "or allow this one to be replaced with --overwrite"
            )

    @contextlib.contextmanager
    def prepared(self, settings, backend, dataset):
        """Makes and locks the folder, and clears it for a new run or keeps what a run resumes from.

        Args:
            settings: `Settings` of the run.
            backend: string, what Keras computes with.
            dataset: `Dataset` that is trained on; a run may resume on the same images elsewhere.

        Raises:
            CommandError: if the folder holds another run, or another process works there.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            # Another process may have finished there since.
            self.check(settings.overwrite)
            config = json.loads(json.dumps({**settings.to_json(), "backend": backend}))
            before = {} if settings.overwrite else self._settings()
            if not settings.overwrite and "recipe" not in before:
                self._refuse_unknown_files()
            for folder in (self.path, self.checkpoints):
                for part in folder.glob(PARTS):  # What a killed process was writing.
                    part.unlink()
            if not settings.overwrite and self.has_checkpoint:
                self._refuse_changes(current_names(before), config, dataset)
                self._refuse_damaged_best_model()
                print(f"Resuming the run in {self}.")
            else:
                # What an earlier run saved as its model stays until this one has a model of its
                # own.
                logs = (self.path / "tensorboard").rglob("events.out.tfevents.*")
                for path in (*self._of_one_run, self.path / CHECKSUMS, *logs):
                    path.unlink(missing_ok=True)
                self.remove_checkpoints()
            write_json(self.config, config)
            yield

    @contextlib.contextmanager
    def _locked(self):
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(self.path))
            except RunLocked as error:
                raise CommandError(str(error)) from error
            yield

    def remove_checkpoints(self):
        """Removes the checkpoints, and their folder unless other files lie there."""
        for path in (*self.checkpoints.glob(CHECKPOINT_NAMES), self.checkpoints / CHECKPOINT_NOTE):
            path.unlink(missing_ok=True)  # Another process may be about to remove it.
        with contextlib.suppress(OSError):
            self.checkpoints.rmdir()

    def write_checksums(self):
        write_checksums(self.path, [path.name for path in self._files()])

    def _files(self):
        return (*self._of_one_run, self.model, self.config)

    def _settings(self):
        """What `config.json` holds; empty where there is none."""
        if not self.config.exists():
            return {}
        try:
            before = json.loads(self.config.read_text(encoding="utf-8"))
        except ValueError:
            before = None
        if not isinstance(before, dict):
            raise CommandError(
                f"{self.config} is damaged: start over in its folder with --overwrite"
            )
        return before

    def _refuse_unknown_files(self):
        others = (*self._files(), self.path / CHECKSUMS, self.checkpoints)
        if found := [path.name for path in others if path.exists()]:
            raise CommandError(
                f"{self} holds {', '.join(found)}, but not the settings of a run: choose "
                "another folder with --output, or allow these to be replaced with --overwrite"
            )

    def _refuse_changes(self, before, now, dataset):
        changes = {
            name: f"{name} was {before.get(name)!r} and is {now.get(name)!r}"
            for name in {**before, **now}
            if name not in MAY_CHANGE and before.get(name) != now.get(name)
        }
        if "dataset" in changes:
            if self._has_trained_on(dataset):
                del changes["dataset"]
            else:
                changes["dataset"] += ", with other training images or labels"
        if changes:
            raise CommandError(
                f"{self} holds an interrupted run with other settings in {self.config.name}: "
                f"{'; '.join(changes.values())}. Choose another folder with --output, or start "
                "over in this one with --overwrite"
            )

    def _has_trained_on(self, dataset):
        """Whether the newest checkpoint was made with the training images of a `Dataset`."""
        try:
            checkpoint = newest(self.checkpoints)
        except DifferentVariables:
            return False
        return checkpoint is not None and checkpoint.data == digest(dataset)

    def _refuse_damaged_best_model(self):
        try:
            if self.best_model.exists():
                check_archive(self.best_model, math.inf)
        except ModelError as error:
            raise CommandError(
                f"{error}. Remove it to resume without the best model so far, or start over with "
                "--overwrite"
            ) from error


def check_apart(folder, dataset, flag):
    """Raises a `CommandError` if what is written to a folder would lie among images of a data set.

    A folder of its own inside the data set is fine: it is not taken for a class.

    Args:
        folder: string or `Path`, which may not exist yet.
        dataset: string, what `--dataset` names.
        flag: string, the option that names the folder.
    """
    if not is_folder(dataset):
        return
    data, place = pathlib.Path(dataset).expanduser().resolve(), pathlib.Path(folder).resolve()
    holds_images = place.is_dir() and not is_output(place) and visible(place)
    if place == data or place.is_relative_to(data) and holds_images:
        raise CommandError(
            f"{flag} {folder} holds images of --dataset {dataset}: choose a new folder, such as "
            f"{pathlib.Path(folder) / 'output'}"
        )


def check_writable(folder, flag):
    """Raises a `CommandError` unless a folder can be made and written to; nothing is made yet."""
    folder = pathlib.Path(folder)
    try:
        nearest = next(path for path in (folder, *folder.parents) if path.exists())
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        error.filename = None  # Of a temporary file.
        raise CommandError(f"{failed_write(error, folder)} Choose another {flag}.") from error
