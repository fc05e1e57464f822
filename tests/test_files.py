"""Files appear whole or not at all; a folder has one owner."""

import os
import subprocess
import sys

import pytest

from keras_vit.files import RunLocked, atomic_write, locked


def test_a_file_takes_its_place_once_it_is_complete(tmp_path):
    target = tmp_path / "numbers.json"
    target.write_text("before")
    with atomic_write(target) as path:
        path.write_text("after")
        assert path.suffix == target.suffix
        assert target.read_text() == "before"
    assert target.read_text() == "after"
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_a_writer_that_fails_leaves_what_was_there(tmp_path):
    target = tmp_path / "numbers.json"
    target.write_text("before")
    with pytest.raises(OSError, match="full"), atomic_write(target) as path:
        path.write_text("half of")
        raise OSError("disk full")
    assert target.read_text() == "before"
    assert os.listdir(tmp_path) == ["numbers.json"]


def test_a_folder_that_another_process_has_is_refused_until_that_ends(tmp_path):
    script = (
        "import pathlib, sys\nfrom keras_vit.files import locked\n"
        "with locked(pathlib.Path(sys.argv[1])):\n    print('mine', flush=True)\n    input()"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", script, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert owner.stdout.readline() == "mine\n"
    with pytest.raises(RunLocked, match=f"in use by process {owner.pid} on "), locked(tmp_path):
        pass
    owner.kill()
    owner.wait()
    with locked(tmp_path):
        pass
