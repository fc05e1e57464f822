"""Trainings in processes of their own, and the table of fine-tuning."""

import queue
import subprocess

import pytest

from benchmarks import fine_tuning, runs
from keras_vit_cli import settings


def cores():
    free = queue.SimpleQueue()
    free.put(None)
    return free


def test_a_finished_run_is_not_repeated_and_a_failed_one_frees_its_core(tmp_path, monkeypatch):
    started = []

    def start(command, **_):
        started.append(command)
        raise subprocess.CalledProcessError(2, command)

    monkeypatch.setattr(subprocess, "run", start)
    free = cores()
    with pytest.raises(subprocess.CalledProcessError):
        runs.run(["train", "--seed", "1"], tmp_path / "first", free)
    assert free.qsize() == 1
    assert started == [["train", "--seed", "1"]]
    (tmp_path / "first" / "metrics.json").write_text("{}")
    runs.run(["train", "--seed", "1"], tmp_path / "first", free)
    with pytest.raises(SystemExit, match="other options"):
        runs.run(["train", "--seed", "2"], tmp_path / "first", free)
    assert len(started) == 1


def test_each_contestant_trains_on_the_same_images(tmp_path):
    for name, (words, epochs) in fine_tuning.CONTESTANTS.items():
        _, program, *rest = fine_tuning.command(name, tmp_path, 1, tmp_path / "run")
        if name == fine_tuning.TIMM:
            continue
        run = settings.parse(rest)
        assert program.endswith("train.py") and rest[: len(words)] == words
        assert (run.training.epochs, run.seed, run.image_size) == (epochs, 1, 32)
        assert (run.dataset, run.output) == (str(tmp_path), str(tmp_path / "run"))


def test_the_table_has_the_mean_over_the_seeds():
    measured = {"accuracy": [0.5, 0.6], "training_seconds": [60, 120]}
    found = {"a": {"x": measured, "y": {**measured, "accuracy": [0.7, 0.7]}}}
    assert fine_tuning.table(found)[2] == "| a | 55.0 ± 7.1 | 70.0 ± 0.0 | 3.0 |"
