"""Which runs an ablation starts, once each, and the table that it makes of them."""

import pathlib

import pytest

from benchmarks import ablation
from keras_vit_cli import settings
from keras_vit_cli.recipes import RECIPES


@pytest.mark.parametrize("mode", ["add", "remove"])
def test_each_run_differs_by_one_part_from_the_first(mode):
    runs = {name: settings.parse(words).training for name, words in ablation.variants(mode).items()}
    first, *others = runs
    assert runs[first] != runs[others[-1]]
    if mode == "remove":
        assert runs[first] == RECIPES["strong"]
    else:
        assert runs.pop("all of them") == RECIPES["strong"]
    left = runs.pop(first)
    for fields, recipe in zip(ablation.PARTS.values(), runs.values(), strict=True):
        changed = {x for x in vars(recipe) if getattr(recipe, x) != getattr(left, x)}
        assert changed and changed <= {*fields, "warmup"}
        expected = RECIPES["strong"] if mode == "add" else RECIPES["baseline"]
        assert all(getattr(recipe, x) == getattr(expected, x) for x in changed)


def test_the_table_starts_with_what_changes_most():
    rows = ablation.table({"strong": 0.9, "without a": 0.89, "without b": 0.95})
    assert rows[2:] == [
        "| strong | 90.00% | |",
        "| without b | 95.00% | +5.00 |",
        "| without a | 89.00% | -1.00 |",
    ]


def test_the_last_epoch_counts(tmp_path: pathlib.Path):
    (tmp_path / "history.csv").write_text("epoch,val_accuracy\n1,0.9\n2,0.5\n")
    assert ablation.accuracy(tmp_path) == 0.5
