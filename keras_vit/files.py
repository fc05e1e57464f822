"""Atomic file writes, checksums and directory locks."""

import contextlib
import hashlib
import json
import os
import platform
import secrets

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


# What Synology, macOS's archives, Linux and Windows leave in folders of people's files.
SYSTEM_NAMES = {"@eadir", "__macosx", "lost+found", "thumbs.db", "desktop.ini", "$recycle.bin"}
TEXT_SUFFIXES = {".txt", ".md", ".csv", ".tsv", ".json", ".xml", ".html", ".yaml", ".yml", ".log"}
PARTS = ".part-*"  # Temporary files of atomic writes.
CHECKSUMS = "SHA256SUMS"
# What a run directory has from its start.
CONFIG, LOCK = "config.json", ".lock"
# What other folders of output have: those of pictures, and TensorFlow's SavedModel.
OUTPUT_MARK, SAVED_MODEL = ".keras_vit_output", "saved_model.pb"


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
    # No process number: containers that share a disk may have the same one.
    temporary = path.with_name(PARTS.replace("*", f"{secrets.token_hex(8)}-{path.name}"))
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


def make_output(folder):
    """Makes a folder for what the program writes, which `is_output` recognizes from then on.

    A folder that holds other files than texts is left as it is.

    Args:
        folder: `Path`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if all(map(_is_ignored, folder.iterdir())):
        (folder / OUTPUT_MARK).write_text("Written by keras_vit, no images to train on.\n")


def is_output(folder):
    """Whether a folder holds output of the program, which is no data, or only such folders.

    Args:
        folder: `Path` of an existing folder.
    """
    names = {path.name for path in folder.iterdir()}
    is_run = CONFIG in names and names & {LOCK, CHECKSUMS}
    if is_run or names & {OUTPUT_MARK, SAVED_MODEL}:
        return True
    inner = [folder / name for name in names if not _is_ignored(folder / name)]
    return bool(inner) and all(
        path.is_dir() and not path.is_symlink() and is_output(path) for path in inner
    )


def links_to_own_parent(path):
    """Whether a path is a link to a folder that it lies in."""
    return path.is_symlink() and path.parent.resolve().is_relative_to(path.resolve())


def visible(folder):
    """Sorted files in and below a folder, without hidden ones, those of systems, and texts.

    Linked folders are followed, each folder once. Folders that the program wrote are left out.
    """
    files, folders, links, entered = [], [folder], [], set()
    while folders or links:
        # A folder is entered by its own path rather than by a link.
        current = folders.pop() if folders else links.pop()
        if current.resolve() in entered:
            continue
        entered.add(current.resolve())
        for path in sorted(current.iterdir(), reverse=True):
            if _is_ignored(path):
                continue
            if path.is_file():
                files.append(path)
            elif path.is_dir() and not links_to_own_parent(path) and not is_output(path):
                (links if path.is_symlink() else folders).append(path)
    return sorted(files)


def _is_ignored(path):
    """Whether a file or folder is a system's, or a text: neither images nor a class."""
    is_text = path.suffix.casefold() in TEXT_SUFFIXES and path.is_file()
    return is_system_name(path.name) or is_text


def write_json(path, content):
    """Writes a dictionary or a list as indented JSON."""
    with atomic_write(path) as part:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # File names may be arbitrary bytes.
        part.write_text(text, encoding="utf-8", errors="surrogateescape")


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
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
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
