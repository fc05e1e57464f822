"""`report`: the report of a finished run, written again from its files and its model."""

import json
import pathlib
import tempfile

from keras_vit.data.dataset import digest
from keras_vit.prediction import predict
from keras_vit.reporting import figures
from keras_vit.reporting.report import write_report
from keras_vit.training import read_history, step_schedule
from keras_vit_cli.errors import CommandError, explaining_failed_writes
from keras_vit_cli.inputs import load_model, load_suitable
from keras_vit_cli.page import write as write_page
from keras_vit_cli.run_directory import RunDirectory
from keras_vit_cli.settings import read_config, resolve

# Ends an error about the data set that a run or a file names.
MOVED_DATA = ". If the data of this run lie elsewhere now, name them with --dataset or --data-dir"


def run(options):
    """Writes the report of a finished run again; returns the exit status."""
    run_dir = RunDirectory(options.run)
    settings = resolve(read_config(run_dir.config))
    if not run_dir.metrics.exists():
        raise CommandError(f"{run_dir} holds no finished run: metrics.json is missing")
    model = load_model(run_dir.model)
    source, data_dir = options.dataset or settings.dataset, options.data_dir or settings.data_dir
    with explaining_failed_writes(run_dir), tempfile.TemporaryDirectory() as folder:
        try:
            measured = json.loads(run_dir.metrics.read_text(encoding="utf-8"))
            history = read_history(run_dir.path)
            dataset = _loaded(model, run_dir, source, data_dir)
            dataset, _ = dataset.without(model.seen).for_training(
                settings.validation, settings.limit_train, settings.seed
            )
            if measured.get("training_data", "") not in ("", digest(dataset)):
                raise CommandError(
                    f"{source} has other training images or labels than {run_dir} was trained on: "
                    "name the data set as it was with --dataset"
                )
            probabilities = predict(model, dataset.test_images)
            pictures = pathlib.Path(folder)
            language = options.language or settings.language
            draw(model, dataset, settings.training, probabilities, history, pictures, language)
            facts = settings, measured, probabilities
            path = write_pages(run_dir, model, dataset, *facts, pictures, language)
        except (KeyError, ValueError) as error:
            raise CommandError(f"{run_dir} holds no run to report on: {error}") from error
        run_dir.write_checksums()
    print(f"Report: {path}")
    return 0


def _loaded(model, run_dir, source, data_dir):
    """The data set of a run; an error says that it may lie elsewhere now."""
    try:
        return load_suitable(model, run_dir.model, source, data_dir)
    except CommandError as error:
        raise CommandError(f"{str(error).rstrip('.')}{MOVED_DATA}") from error


def draw(model, dataset, recipe, probabilities, history, folder, language):
    """Draws the pictures of a run into a folder, with texts in a language."""
    milestone_epochs = []
    if recipe.schedule == "milestones":
        _, drops = step_schedule(recipe.learning_rate, recipe.epochs, recipe.milestones)
        milestone_epochs = [x for x in drops if x < len(history["loss"])]
    figures.draw_all(model, dataset, probabilities, folder, history, milestone_epochs, language)


def write_pages(run_dir, model, dataset, settings, measured, probabilities, pictures, language):
    """Writes the report of a run, and beside it the page that runs its model, if one can.

    Returns:
        `Path` of the report.
    """
    path = run_dir.report_in(language, settings.language)
    page = run_dir.page_in(language, settings.language)
    try:
        write_page(page, model, dataset, language)
    except ValueError:  # Too large, or of other images than those of a browser.
        page.unlink(missing_ok=True)
        page = None
    facts = settings.to_json(), measured, probabilities
    write_report(path, model, dataset, *facts, pictures, language, page and page.name)
    return path
