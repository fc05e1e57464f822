"""Atomic file writes, and directory locks."""

import os
import subprocess
import sys

import pytest

from keras_vit.files import RunLocked, atomic_write, locked


def test_a_file_is_replaced_only_when_the_new_one_is_complete(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("before")
    with atomic_write(target) as path:
        path.write_text("after")
        assert path.suffix == target.suffix
        assert target.read_text() == "before"
    assert target.read_text() == "after"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_two_writers_of_a_file_do_not_meet(tmp_path):
    """As in two containers on a shared disk, whose processes have the same number."""
    target = tmp_path / "array.npy"
    with atomic_write(target) as first, atomic_write(target) as second:
        first.write_text("first")
        second.write_text("second")
    assert target.read_text() == "first"
    assert os.listdir(tmp_path) == ["array.npy"]


def test_a_failed_write_leaves_the_old_file_unchanged(tmp_path):
    target = tmp_path / "metrics.json"
    target.write_text("before")
    with pytest.raises(OSError, match="full"), atomic_write(target) as path:
        path.write_text("half of")
        raise OSError("disk full")
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["metrics.json"]


def test_a_locked_directory_is_refused_until_the_other_process_ends(tmp_path):
    script = (
        "import pathlib, sys\nfrom keras_vit.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('locked', flush=True)\n    input()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(RunLocked, match=f"in use by process {holder.pid} on "), locked(tmp_path):
        pass
    holder.kill()
    holder.wait()
    with locked(tmp_path):
        pass
