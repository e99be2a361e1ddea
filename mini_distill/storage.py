"""Files and folders that are whole or not there at all: the one writer of the package.

A file or a folder is built beside its final name, made durable (fsync), and only then renamed. A process that is killed at any
point leaves a temporary behind, never something half-written under the final name.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import logging
import os
import re
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from .errors import MiniDistillError, StorageError
from .processes import is_alive, this_host

if TYPE_CHECKING:
    import numpy as np

MANIFEST = "MANIFEST.json"

logger = logging.getLogger(__name__)

_REMEDIES = {
    errno.ENOSPC: "Free some space, or choose another folder.",
    errno.EDQUOT: "Free some of your quota, or choose another folder.",
    errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another folder.",
    errno.EROFS: "Choose a folder on a file system that is not read-only.",
    errno.EACCES: "Give yourself the right to write there, or choose another folder.",
    errno.EPERM: "Give yourself the right to write there, or choose another folder.",
    errno.EEXIST: "Move it away, or choose another folder.",
    errno.ENOTDIR: "A file stands where a folder is needed: move it away, or choose another folder.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
}


def user_cache() -> Path:
    """Where what runs share is kept: $MINI_DISTILL_CACHE, or ~/.cache/mini_distill."""
    return Path(os.environ.get("MINI_DISTILL_CACHE") or Path.home() / ".cache" / "mini_distill").expanduser()


# --------------------------------------------------------------------------------------------------------------------- errors


@contextlib.contextmanager
def storage_errors(path: Path | str, doing: str) -> Iterator[None]:
    """What goes wrong with the file system inside becomes one line: `<path>: cannot <doing>: No space left on device.`

    Raises:
        StorageError: for an OSError, and for the error of a library written in Rust (safetensors, tokenizers) that wraps one.
    """
    try:
        yield
    except MiniDistillError:
        raise
    except Exception as error:
        number = _errno(error)
        if number is None:
            raise
        what = getattr(error, "strerror", None) or os.strerror(number)
        raise StorageError(str(path), f"cannot {doing}: {what}", _REMEDIES.get(number, "")) from error


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    wrapped = re.search(r"\(os error (\d+)\)", str(error))  # how Rust prints an I/O error
    return int(wrapped.group(1)) if wrapped else None


# -------------------------------------------------------------------------------------------------------- reading and appending


def open_regular(path: Path | str, flags: int) -> int:
    """A descriptor of a regular file. A pipe in its place would be waited for without end, and a device never ends.

    Raises:
        OSError: there is something else, or no such file.
    """
    descriptor = os.open(path, flags | os.O_CLOEXEC | os.O_NONBLOCK, 0o666)  # opening waits for nobody; reading is no different
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return descriptor


def read_regular(path: Path | str) -> bytes:
    """The content of a regular file; raises as `open_regular`."""
    with open(open_regular(path, os.O_RDONLY), "rb") as file:
        return file.read()


# ---------------------------------------------------------------------------------------------------------------- atomic writes


def atomic_write_text(path: Path | str, text: str | Iterable[str]) -> None:
    """Write `text` as UTF-8 to `path`; whatever happens, the file holds the old text or the new one.

    Args:
        path: The file.
        text: All of it, or its parts one after the other.

    Raises:
        StorageError: the disk is full, read-only, …; the old file is then untouched.
    """
    path = Path(path)
    with storage_errors(path, "write"), _temporary_beside(path) as temporary:
        with open(temporary, "x", encoding="utf-8", newline="\n") as file:
            file.writelines([text] if isinstance(text, str) else text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)


def write_array(path: Path | str, values: np.ndarray) -> None:
    """A new .npy file, as `np.save` writes it; which on a full disk cuts small files without a word, as its flush is not checked.

    Raises:
        OSError: the disk is full, …; the file is then to be thrown away.
    """
    from numpy import ascontiguousarray
    from numpy.lib import format as npy

    rows = ascontiguousarray(values)
    with open(path, "xb") as file:
        npy.write_array_header_1_0(file, npy.header_data_from_array_1_0(rows))
        file.write(rows.data)


@contextlib.contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Build the folder `path` as a whole: `with atomic_folder(path) as temporary: …` writes its files into `temporary`.

    After the block a `MANIFEST.json` with size and SHA-256 of every file is added, everything is fsynced, and the temporary
    folder is renamed to `path`, in place of a folder that was there. If the block raises, nothing remains of it.

    Raises:
        StorageError: the disk is full, read-only, …; what stood under `path` is then untouched.
    """
    path = Path(path)
    with storage_errors(path, "write"):
        _make_parent(path)
        with _temporary_beside(path) as temporary:
            temporary.mkdir()
            yield temporary
            make_readable(temporary)
            _write_manifest(temporary)
            _put_in_place(temporary, path)


def replace_in_folder(path: Path | str, name: str, text: str) -> None:
    """Write `text` to the file `name` of a folder made by `atomic_folder`, which is whole with the old text and with the new one.

    The other files are not copied where the file system knows hard links.

    Raises:
        StorageError: the disk is full, read-only, …; the folder is then untouched.
    """
    path = Path(path)
    with atomic_folder(path) as temporary:
        leave_out = shutil.ignore_patterns(MANIFEST, name)
        shutil.copytree(path, temporary, symlinks=True, ignore=leave_out, copy_function=_link_or_copy, dirs_exist_ok=True)
        (temporary / name).write_text(text, encoding="utf-8", newline="\n")


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def remove_folder(path: Path | str) -> None:
    """Delete a folder so that it disappears from its name at once: a deletion cut short leaves no half of it there.

    A folder that cannot be deleted is named in a warning: old files are no reason to end a run.
    """
    path = Path(path)
    try:
        with _temporary_beside(path) as doomed:  # which removes whatever has this name at the end
            os.rename(path, doomed)
            _sync_folder(path.parent)
    except OSError as error:
        logger.warning("%s: cannot be deleted: %s", path, error.strerror)


def make_readable(folder: Path | str) -> None:
    """Give every file in `folder` the permissions that a new file gets here; transformers saves with mode 0600."""
    mode = os.stat(folder).st_mode & 0o666  # mkdir has applied the umask, which cannot be read without changing it
    for file in _walk_files(Path(folder)):
        if not file.is_symlink():
            os.chmod(file, mode)


def free_name(path: Path) -> Path:
    """The first of `<path>.old-1`, `<path>.old-2`, … that is not taken."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.old-{number}")):
        number += 1
    return aside


def _make_parent(path: Path) -> None:
    if not path.parent.is_dir():
        path.parent.mkdir(parents=True, exist_ok=True)
        _sync_folder(path.parent.parent)


def _write_manifest(folder: Path) -> None:
    files = {}
    for file in sorted(_walk_files(folder)):
        with open(file, "rb") as opened:
            digest = hashlib.file_digest(opened, "sha256").hexdigest()
            os.fsync(opened.fileno())
            files[file.relative_to(folder).as_posix()] = {"size": os.fstat(opened.fileno()).st_size, "sha256": digest}
    with open(folder / MANIFEST, "x", encoding="utf-8") as manifest:
        json.dump({"files": files}, manifest, indent=1, sort_keys=True)
        manifest.flush()
        os.fsync(manifest.fileno())
    for inner, _, _ in os.walk(folder, topdown=False):
        _sync_folder(Path(inner))


def _put_in_place(temporary: Path, path: Path) -> None:
    """Rename, with what was there moved aside first: a folder cannot be renamed over a full one."""
    replaced = _temporary_name(path, "old")  # if we die before the second rename, the next start gives it its name back
    if os.path.lexists(path):
        os.rename(path, replaced)
    try:
        os.rename(temporary, path)
    except OSError:
        if os.path.lexists(replaced):
            os.rename(replaced, path)
        raise
    _sync_folder(path.parent)
    _delete(replaced)


def _walk_files(folder: Path) -> Iterator[Path]:
    for inner, _, names in os.walk(folder, onerror=_raise):
        yield from (Path(inner) / name for name in names)


def _raise(error: OSError) -> None:
    raise error  # os.walk passes over folders it cannot read


def _sync_folder(folder: Path) -> None:
    """Make the names in `folder` durable; some network file systems cannot, and say so with EINVAL."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------------- temporaries

# .tmp-<name>-<pid>@<host>-<random>; "old" instead of "tmp" is what `name` was before it is replaced.
_TEMPORARY = re.compile(r"^\.(?P<kind>tmp|old)-(?P<name>.+)-(?P<pid>\d+)(@(?P<host>.+))?-(?P<random>[0-9a-f]+)$")
_in_use: set[str] = set()
_gone: set[str] = set()


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """A name beside `path` for a file or folder, which is gone afterwards if it was not renamed."""
    temporary = _temporary_name(path, "tmp")
    _in_use.add(temporary.name)
    try:
        yield temporary
    finally:
        _delete(temporary)
        _in_use.discard(temporary.name)


def _temporary_name(path: Path, kind: str) -> Path:
    return path.parent / f".{kind}-{path.name}-{os.getpid()}@{this_host()}-{secrets.token_hex(4)}"


def remove_stale_temporaries(parent: Path | str) -> None:
    """Clear what dead processes of this host left in `parent`; what belongs to a living one or to another host stays.

    A folder that was just being replaced when its process died is given its name back.
    """
    with storage_errors(parent, "clear temporary files"):
        for entry in sorted(Path(parent).iterdir()) if Path(parent).is_dir() else []:
            match = _TEMPORARY.match(entry.name)
            if match is None or not _is_stale(entry.name, match):
                continue
            final = entry.parent / match["name"]
            if match["kind"] == "old" and not os.path.lexists(final):
                with contextlib.suppress(FileNotFoundError):  # another rank was quicker
                    os.rename(entry, final)
            else:
                _delete(entry)


def mark_as_gone(pid: int, host: str) -> None:
    """A process of another host is known to be dead: what it left behind is cleared as that of one of this host would be."""
    _gone.add(f"{pid}@{host}")


def _is_stale(name: str, match: re.Match[str]) -> bool:
    if f"{match['pid']}@{match['host']}" in _gone:
        return True
    if match["host"] not in (None, this_host()):
        return False
    if int(match["pid"]) == os.getpid():  # in a container every process may be number 1
        return name not in _in_use
    return not is_alive(int(match["pid"]))


def _delete(path: Path) -> None:
    """Delete a file or folder, as far as possible: what remains is cleared at the next start."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


# -------------------------------------------------------------------------------------------------------------------- verifying


def verify_folder(path: Path | str, may_grow: bool = False) -> list[str]:
    """What is wrong with a folder made by `atomic_folder`, one line each; empty when every file is as it was written.

    Files may be missing, added, of another size or content, or reached through a link that leaves the folder; a manifest
    may name files outside it. Nothing outside the folder is opened.

    Args:
        path: The folder.
        may_grow: Whether files beside those of the manifest are fine.
    """
    folder = Path(path)
    try:
        expected = _read_manifest(folder)
        problems = [problem for name, entry in sorted(expected.items()) if (problem := _check_file(folder, name, entry))]
        found = {file.relative_to(folder).as_posix() for file in _walk_files(folder)}
        links = {link.relative_to(folder).as_posix() for link in _linked_folders(folder)}
    except OSError as error:
        return [f"{Path(error.filename or folder).name}: cannot be read: {error.strerror}"]
    except ValueError as error:
        return [f"{MANIFEST}: {error}"]
    if not may_grow:
        problems += [f"{name}: not in the manifest" for name in sorted(found - set(expected) - {MANIFEST})]
    return problems + [f"{name}: a link to another folder" for name in sorted(links)]


def _read_manifest(folder: Path) -> dict[str, Any]:
    """Name -> {size, sha256}. Raises ValueError where it is not such a manifest."""
    file = folder / MANIFEST
    if not os.path.lexists(file):
        raise ValueError("missing")
    if file.is_symlink() or not file.is_file():
        raise ValueError("not a regular file")
    try:
        files = json.loads(file.read_bytes())["files"]
        assert isinstance(files, dict) and all(isinstance(e["size"], int) and isinstance(e["sha256"], str) for e in files.values())
    except (ValueError, KeyError, TypeError, AssertionError, RecursionError):
        raise ValueError("not a manifest of sizes and checksums") from None
    return files


def _check_file(folder: Path, name: str, entry: dict[str, Any]) -> str | None:
    parts = PurePosixPath(name)
    if not name or "\0" in name or parts.is_absolute() or ".." in parts.parts:
        return f"{name!r}: names a file outside the folder"
    file = folder / name
    if not os.path.lexists(file):
        return f"{name}: missing"
    if not file.resolve().is_relative_to(folder.resolve()):
        return f"{name}: a link that leaves the folder"
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        return f"{name}: not a regular file"
    if status.st_size != entry["size"]:
        return f"{name}: {status.st_size} bytes, expected {entry['size']}"
    with open(file, "rb") as opened:
        if hashlib.file_digest(opened, "sha256").hexdigest() != entry["sha256"]:
            return f"{name}: wrong checksum"
    return None


def _linked_folders(folder: Path) -> Iterator[Path]:
    for inner, names, _ in os.walk(folder):
        yield from (link for name in names if (link := Path(inner) / name).is_symlink())


# ------------------------------------------------------------------------------------------------------------- before the start


def near_path(path: Path) -> str:
    """`Did you mean 'runs/default'?` of a file or folder that is not there, or the empty string when nothing beside it is called alike."""
    try:
        beside = [] if path.exists() else sorted(os.listdir(path.parent))
    except (OSError, ValueError):  # as a path can be too long, or have a NUL in it
        return ""
    near = get_close_matches(path.name, beside, n=1, cutoff=0.7)
    return f"Did you mean '{path.parent / near[0]}'?" if near else ""


def check_writable(path: Path | str, needed_bytes: int = 0) -> None:
    """Make the folder `path` if need be and try it out, so that a run fails in its first second and not at its first save.

    Args:
        path: the folder that will be written.
        needed_bytes: free space that the run will want there.

    Raises:
        StorageError: the folder cannot be made or written, or there is too little space.
    """
    path = Path(path)
    if "\0" in str(path):
        raise StorageError(repr(str(path)), "not a possible name of a folder", "Choose another.")
    with storage_errors(path, "make the folder"):
        path.mkdir(parents=True, exist_ok=True)
    with storage_errors(path, "write into the folder"):
        with _temporary_beside(path / "probe") as probe, open(probe, "xb") as file:
            file.write(b"1")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(path).free
    if free < needed_bytes:
        remedy = "Free some space, choose another folder, or lower trainer.keep_checkpoints."
        raise StorageError(str(path), f"{size_text(free)} of free space, expected at least {size_text(needed_bytes)}", remedy)


def size_text(count: float) -> str:
    """Bytes for people: 31.4 MB."""
    units = ["bytes", "kB", "MB", "GB", "TB"]
    while count >= 1000 and len(units) > 1:
        count /= 1000
        units.pop(0)
    return f"{count:.3g} {units[0]}"
