"""Files that are there whole or as they were before, and folders that one process owns."""

import contextlib
import hashlib
import json
import os
import platform

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


PARTS = ".part-*"  # Files that are not complete yet.
CHECKSUMS = "SHA256SUMS"


class RunLocked(RuntimeError):
    """A folder belongs to another process."""


@contextlib.contextmanager
def atomic_write(path):
    """Lends a path beside `path`; what is written there takes its place once it is complete.

    Args:
        path: `Path` of the file to come.

    Yields:
        `Path` to write to, with the same ending.
    """
    beside = path.with_name(PARTS.replace("*", f"{os.getpid()}-{path.name}"))
    try:
        yield beside
        with open(beside, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise
    _flush_names(path.parent)


def _flush_names(folder):
    """Makes a rename last through a loss of power, where folders can be flushed."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def visible(folder):
    """Sorted files in and below a folder, but for hidden ones and those in hidden folders."""
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return [x for x in found if not any(y.startswith(".") for y in x.relative_to(folder).parts)]


def write_json(path, content):
    """Writes a dictionary as indented JSON."""
    with atomic_write(path) as part:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # Names of files are any bytes.
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


def write_checksums(folder, names):
    """Writes `SHA256SUMS`, which `sha256sum --check` reads, about those files that are there."""
    paths = [folder / name for name in sorted(names) if (folder / name).exists()]
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in paths]
    with atomic_write(folder / CHECKSUMS) as path:
        path.write_text("".join(lines), encoding="utf-8")


@contextlib.contextmanager
def locked(folder):
    """Keeps a folder from other processes; the lock ends with the process, however that ends.

    Windows, and file systems that know no locks, do without.

    Args:
        folder: `Path` of an existing folder.

    Raises:
        RunLocked: if a process has it, which the message names.
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
