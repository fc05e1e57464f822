"""Messages for people: warnings on stderr, shortened lists."""

import sys


def warn(message):
    print(f"WARNING: {message}", file=sys.stderr)


def enumerated(items, separator=", "):
    """The first items of a list, for a message."""
    return separator.join([*items[:5], *(["..."] if len(items) > 5 else [])])


def is_terminal():
    """Whether stdout is a terminal, which can show a progress bar."""
    return sys.stdout is not None and sys.stdout.isatty()
