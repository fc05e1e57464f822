"""stdout and stderr that take any name, and that nobody has to read to the end."""

import io
import os
import pathlib
import subprocess
import sys

import pytest

from keras_vit_cli import streams

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
def test_what_stdout_cannot_express_is_escaped_and_file_names_keep_their_bytes(
    encoding, monkeypatch
):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding))
    streams.prepare()
    print("é żółw 猫", os.fsdecode(b"\xe9"), end="", flush=True)
    expected = "é żółw 猫".encode(encoding, "backslashreplace")
    assert written.getvalue() == expected + b" \xe9"


def test_a_pipe_that_nobody_reads_takes_everything():
    reading, writing = os.pipe()
    os.close(reading)
    with io.BufferedWriter(streams.Unread(writing, "w")) as file:
        file.write(b"x" * 100_000)
        file.flush()


@pytest.mark.skipif(sys.platform == "win32", reason="no such redirection")
def test_files_do_not_become_a_closed_stdout(tmp_path):
    source = (
        "from keras_vit_cli import streams; streams.prepare(); file = open('x', 'w'); print(1);"
        "file.write('learned')"
    )
    command = f'"{sys.executable}" -c "{source}" >&- 2>&- <&-'
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run(command, shell=True, cwd=tmp_path, env=environment).returncode == 0
    assert (tmp_path / "x").read_text() == "learned"
