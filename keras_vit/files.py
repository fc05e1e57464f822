"""Atomic file writes, checksums and directory locks."""

import contextlib
import hashlib
import json
import os
import platform
import sys

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# What Synology, macOS's archives, Linux and Windows leave in folders of people's files.
SYSTEM_NAMES = {"@eadir", "__macosx", "lost+found", "thumbs.db", "desktop.ini", "$recycle.bin"}
TEXT_SUFFIXES = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml", ".log"}
PARTS = ".part-*"  # Temporary files of atomic writes.
CHECKSUMS = "SHA256SUMS"


class RunLocked(RuntimeError):
    """Another process holds the lock of a directory."""


@contextlib.contextmanager
def atomic_write(path):
    """Writes a file atomically: to a temporary file beside it, which then takes its place.

    If an exception is raised, the temporary file is removed and `path` stays as it was.

    Args:
        path: `Path` of the file.

    Yields:
        `Path` of the temporary file to write to, with the same suffix.
    """
    temporary = path.with_name(PARTS.replace("*", f"{os.getpid()}-{path.name}"))
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


def _sync_directory(folder):
    """Makes a rename survive a power failure, where the system can sync directories."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def is_system_name(name):
    """Whether files and folders of this name are hidden, or left by a system or an archive."""
    return name.startswith(".") or name.casefold() in SYSTEM_NAMES


def visible(folder):
    """Sorted files in and below a folder, without hidden ones, those of systems, and texts."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [
        path
        for path in paths
        if path.suffix.casefold() not in TEXT_SUFFIXES
        and not any(map(is_system_name, path.relative_to(folder).parts))
    ]


def write_json(path, content):
    """Writes a dictionary as indented JSON."""
    with atomic_write(path) as part:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # File names may be arbitrary bytes.
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def is_terminal():
    """Whether stdout is a terminal, which can show a progress bar."""
    return sys.stdout is not None and sys.stdout.isatty()


def write_checksums(folder, names):
    """Writes `SHA256SUMS`, which `sha256sum --check` reads, for those files that exist."""
    paths = [folder / name for name in sorted(names) if (folder / name).exists()]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    with atomic_write(folder / CHECKSUMS) as path:
        path.write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def locked(folder):
    """Locks a directory; the lock is released when the process ends, even if it is killed.

    On Windows, and on file systems without locks, nothing is locked.

    Args:
        folder: `Path` of an existing directory.

    Raises:
        RunLocked: if another process holds the lock; the message names it.
    """
    with open(folder / ".lock", "a+", encoding="utf-8") as file:
        if fcntl:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                raise RunLocked(f"{folder} is in use by {file.read().strip()}") from None
            except OSError:
                pass  # A file system without locks.
        file.seek(0)
        file.truncate()
        file.write(f"process {os.getpid()} on {platform.node()}\n")
        file.flush()
        yield
