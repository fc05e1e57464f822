"""The notebook and the README's Python example run unchanged."""

import json
import pathlib
import re

import keras
import matplotlib
import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        keras.backend.backend() != "tensorflow",
        reason="running them on one backend is enough",
    ),
]


def run(source, folder, monkeypatch):
    """Runs Python source in an empty folder; returns the names that it defines."""
    monkeypatch.chdir(folder)
    defined = {"__name__": "example"}
    exec(compile(source, "example", "exec"), defined)
    return defined


def test_the_readme_example_runs(tmp_path, monkeypatch):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    *_, lines = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    defined = run(lines, tmp_path, monkeypatch)
    # The shapes in its comments.
    assert defined["scores"].shape == (8, 2, 8, 65, 65)
    assert defined["rollout"].shape == (8, 65, 65)
    np.testing.assert_allclose(defined["rollout"].sum(axis=-1), 1, atol=1e-4)


def test_the_notebook_runs_and_trains_an_accurate_model(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    notebook = json.loads((ROOT / "examples" / "quickstart.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert not any(cell["outputs"] for cell in cells)
    source = "\n".join("".join(cell["source"]) for cell in cells)
    defined = run(source, tmp_path, monkeypatch)
    assert defined["history"].history["val_accuracy"][-1] > 0.9
    assert (tmp_path / "digits.keras").exists()
