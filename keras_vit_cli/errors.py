"""What ends a command, in one line."""

import contextlib


class CommandError(Exception):
    """Something that one line can explain; `status` is the exit status."""

    def __init__(self, message, status=2):
        super().__init__(message)
        self.status = status


@contextlib.contextmanager
def explaining_failed_writes(folder):
    """Turns an `OSError` into one line that names the file, or else the folder."""
    try:
        yield
    except BrokenPipeError:  # Of stdout, which nobody reads any more.
        raise
    except OSError as error:
        raise CommandError(
            f"{error.filename or folder} cannot be read or written: {error.strerror or error}. "
            "What was saved before is still there",
            status=1,
        ) from error
