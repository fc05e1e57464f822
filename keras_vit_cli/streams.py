"""stdout and stderr that take any name, and that nobody has to read to the end."""

import codecs
import contextlib
import io
import os
import sys

ESCAPE = "keras_vit.escape"


def prepare(must_be_read=False):
    """Makes stdout and stderr take every character, and go on when they are closed.

    Args:
        must_be_read: bool, whether a command that prints to a closed pipe ends by a
            `BrokenPipeError`, because it does nothing else.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:  # Closed, as by `>&-`. The next file must not become stdout.
            os.open(os.devnull, os.O_RDWR)
        if getattr(sys, name) is None:
            mode = "w" if number else "r"
            setattr(sys, name, open(number, mode, encoding="utf-8", closefd=False))  # noqa: SIM115
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not must_be_read and stream is getattr(sys, f"__{name}__"):
            stream.flush()
            raw = Unread(stream.fileno(), "w", closefd=False)
            stream = io.TextIOWrapper(
                io.BufferedWriter(raw),
                stream.encoding,
                line_buffering=stream.line_buffering,
                write_through=stream.write_through,
            )
            setattr(sys, name, stream)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors=ESCAPE)


def flush():
    """Hands on what was printed, even if the process is about to end without a clean-up."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, OSError, ValueError):  # None, unread, closed.
            stream.flush()


class Unread(io.FileIO):
    """A file that goes on silently when nobody reads it any more, or its disk is full."""

    def write(self, data):
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _escape(error):
    """Bytes of a file's name as they are, and escapes for characters that an encoding lacks."""
    character = error.object[error.start]
    if "\udc80" <= character <= "\udcff":
        return bytes([ord(character) - 0xDC00]), error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error(ESCAPE, _escape)
