"""What ends a command, in one line."""

import contextlib
import re


class CommandError(Exception):
    """Something that one line can explain; `status` is the exit status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


class Stopped(CommandError):
    """The user stopped a command, which has saved its progress."""


@contextlib.contextmanager
def explaining_failed_writes(folder):
    """Turns an `OSError` into one line that names the file, or else the folder."""
    try:
        yield
    except OSError as error:
        raise CommandError(failed_write(error, folder), status=1) from error


def failed_write(error, folder):
    """What an `OSError` means, in one line that names the file, or else the folder."""
    path = str(error.filename or folder)
    path = re.sub(r"\.part-[0-9a-f]+-([^/\\]+)$", r"\1", path)  # Of an atomic write.
    reason = error.strerror or str(error)
    reason = reason[:1].lower() + reason[1:]
    if isinstance(error, FileNotFoundError):
        return f"Cannot read {path}: {reason}."
    return f"Cannot write to {path}: {reason}. Existing files are unchanged."
