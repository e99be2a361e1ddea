from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path

import pytest
from faults.injection import count_operations, in_child, killed_before_operation, with_file_size_limit

from mini_distill.errors import StorageError
from mini_distill.storage import (
    MANIFEST,
    atomic_folder,
    atomic_write_text,
    check_writable,
    make_readable,
    open_regular,
    read_regular,
    remove_folder,
    remove_stale_temporaries,
    replace_in_folder,
    storage_errors,
    verify_folder,
)


def build(path: Path, text: str = "new") -> None:
    with atomic_folder(path) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner" / "b.txt").write_text(text * 2)


def content(path: Path) -> str | None:
    return (path / "a.txt").read_text() if path.exists() else None


# -------------------------------------------------------------------------------------------------------------------- one file


@pytest.mark.timeout(10)
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_only_regular_files_are_opened(kind: str, tmp_path: Path) -> None:
    """Opening a pipe waits for whoever is at its other end, who may never come; reading a device never ends."""
    file = tmp_path / "file"
    {"pipe": lambda: os.mkfifo(file), "device": lambda: file.symlink_to("/dev/zero"), "folder": file.mkdir}[kind]()
    for flags in (os.O_RDONLY, os.O_RDWR | os.O_CREAT | os.O_APPEND):
        before = len(os.listdir("/proc/self/fd"))
        with (
            pytest.raises(StorageError, match=rf"^{file}: cannot open: (not a regular file|Is a directory)\."),
            storage_errors(file, "open"),
        ):
            open_regular(file, flags)
        assert len(os.listdir("/proc/self/fd")) == before


def test_a_regular_file_is_read_also_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "there").write_bytes(b"content")
    (tmp_path / "link").symlink_to(tmp_path / "there")
    assert read_regular(tmp_path / "link") == b"content"
    with pytest.raises(FileNotFoundError):
        read_regular(tmp_path / "nowhere")


def test_a_text_file_is_replaced_and_nothing_else_stays_behind(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "status.json", "old")
    atomic_write_text(tmp_path / "status.json", "new é\n")
    assert (tmp_path / "status.json").read_bytes() == "new é\n".encode()
    assert os.listdir(tmp_path) == ["status.json"]


def test_a_text_file_killed_anywhere_in_its_writing_is_the_old_or_the_new_one(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    killed = 0
    for number in range(20):
        atomic_write_text(path, "old")
        status = killed_before_operation(number, lambda: atomic_write_text(path, "new"))
        assert path.read_text() in ("old", "new")
        remove_stale_temporaries(tmp_path)
        assert os.listdir(tmp_path) == ["status.json"]
        if status == 0:
            break
        killed += 1
    assert status == 0 and killed >= 4


def test_a_full_disk_leaves_the_old_text_and_is_one_clear_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write_text(tmp_path / "summary.json", "old")
    monkeypatch.setattr(os, "fsync", _raiser(errno.ENOSPC))
    with pytest.raises(StorageError, match=r"summary.json: cannot write: No space left on device\. Free some space"):
        atomic_write_text(tmp_path / "summary.json", "new")
    assert (tmp_path / "summary.json").read_text() == "old"
    assert os.listdir(tmp_path) == ["summary.json"]


def test_new_files_have_the_permissions_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "a", "text")
        with atomic_folder(tmp_path / "student") as folder:
            (folder / "model.safetensors").write_text("weights")
            os.chmod(folder / "model.safetensors", 0o600)  # as transformers and safetensors do
    finally:
        os.umask(before)
    files = [tmp_path / "a", tmp_path / "student" / "model.safetensors", tmp_path / "student" / MANIFEST]
    assert [oct(file.stat().st_mode & 0o777) for file in files] == ["0o640"] * 3


def test_make_readable_reaches_inner_folders_and_leaves_links_alone(tmp_path: Path) -> None:
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    (folder / "inner").mkdir(parents=True)
    for file in (outside, folder / "inner" / "file"):
        file.write_text("x")
        os.chmod(file, 0o600)
    (folder / "link").symlink_to(outside)
    make_readable(folder)
    assert (folder / "inner" / "file").stat().st_mode & 0o777 == folder.stat().st_mode & 0o666
    assert outside.stat().st_mode & 0o777 == 0o600


# ------------------------------------------------------------------------------------------------------------------- one folder


def test_a_folder_carries_a_manifest_of_every_file(tmp_path: Path) -> None:
    build(tmp_path / "step-1")
    files = json.loads((tmp_path / "step-1" / MANIFEST).read_text())["files"]
    assert files == {
        "a.txt": {"size": 3, "sha256": hashlib.sha256(b"new").hexdigest()},
        "inner/b.txt": {"size": 6, "sha256": hashlib.sha256(b"newnew").hexdigest()},
    }
    assert verify_folder(tmp_path / "step-1") == []
    assert os.listdir(tmp_path) == ["step-1"]


def test_an_exception_while_building_leaves_the_old_folder_and_no_temporary(tmp_path: Path) -> None:
    build(tmp_path / "student", "old")
    with pytest.raises(KeyboardInterrupt), atomic_folder(tmp_path / "student") as folder:
        (folder / "a.txt").write_text("half")
        raise KeyboardInterrupt
    assert content(tmp_path / "student") == "old" and os.listdir(tmp_path) == ["student"]


def test_files_are_durable_before_the_rename_and_the_parent_after_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def noted_fsync(descriptor: int) -> None:
        events.append("sync " + Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        fsync(descriptor)

    def noted_rename(old: Path, new: Path) -> None:
        events.append("rename")
        rename(old, new)

    monkeypatch.setattr(os, "fsync", noted_fsync)
    monkeypatch.setattr(os, "rename", noted_rename)
    build(tmp_path / "step-1")
    at = events.index("rename")
    assert {"sync a.txt", "sync b.txt", f"sync {MANIFEST}", "sync inner"} <= set(events[:at])
    assert events[at - 1].startswith("sync .tmp-step-1-")  # the folder itself, last before the rename
    assert events[at + 1] == f"sync {tmp_path.name}"


@pytest.mark.parametrize("existing", ["old", None])
def test_a_folder_killed_anywhere_in_its_saving_is_whole_or_not_there(tmp_path: Path, existing: str | None) -> None:
    """A framework's trainer, killed at each of 59 file operations of a save, left 58 states that could not be resumed."""
    path = tmp_path / "step-1"
    outcomes = []
    for number in range(100):
        if existing:
            build(path, existing)
        elif path.exists():
            remove_folder(path)
        status = killed_before_operation(number, lambda: build(path))
        remove_stale_temporaries(tmp_path)  # what the next start does
        assert content(path) in (existing, "new")
        assert verify_folder(path) == [] if path.exists() else existing is None
        assert set(os.listdir(tmp_path)) <= {"step-1"}
        outcomes.append(content(path))
        if status == 0:
            break
    assert status == 0 and len(outcomes) > 15 and {existing, "new"} == set(outcomes)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_folder_whose_disk_fails_at_any_operation_is_the_old_one_or_the_new_one(tmp_path: Path, number: int) -> None:
    path, failed = tmp_path / "step-1", 0
    for operation in range(100):
        build(path, "old")

        def fail(seen: int, operation: int = operation) -> None:
            if seen >= operation:
                raise OSError(number, os.strerror(number))

        with pytest.MonkeyPatch.context() as patch:
            count_operations(fail, patch)
            try:
                build(path)
            except StorageError as error:
                assert os.strerror(number) in str(error) and "\n" not in str(error)
                failed += 1
            else:
                break
        remove_stale_temporaries(tmp_path)
        assert content(path) in ("old", "new") and verify_folder(path) == []
    assert failed > 10 and content(path) == "new"


def test_a_write_that_the_kernel_refuses_half_way_leaves_nothing(tmp_path: Path) -> None:
    def save() -> None:
        with pytest.raises(StorageError, match="File too large"):
            build(tmp_path / "step-1", "x" * 5000)
        assert os.listdir(tmp_path) == []

    assert with_file_size_limit(3000, save) == 0


def test_an_io_error_wrapped_by_a_rust_library_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="cannot write: No space left on device"), storage_errors(tmp_path, "write"):
        raise Exception("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(ZeroDivisionError), storage_errors(tmp_path, "write"):
        _ = 1 / 0


def test_a_file_is_replaced_in_a_folder_that_stays_whole(tmp_path: Path) -> None:
    build(tmp_path / "folder")
    other = (tmp_path / "folder" / "inner" / "b.txt").stat().st_ino
    replace_in_folder(tmp_path / "folder", "a.txt", "newer é\n")
    assert content(tmp_path / "folder") == "newer é\n" and not verify_folder(tmp_path / "folder")
    assert (tmp_path / "folder" / "inner" / "b.txt").stat().st_ino == other  # not copied
    assert os.listdir(tmp_path) == ["folder"]


def test_without_hard_links_the_other_files_are_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "folder")
    monkeypatch.setattr(os, "link", _raiser(errno.EPERM))
    replace_in_folder(tmp_path / "folder", "a.txt", "newer")
    assert content(tmp_path / "folder") == "newer" and not verify_folder(tmp_path / "folder")


def test_a_removed_folder_disappears_from_its_name_at_once(tmp_path: Path) -> None:
    for number in range(30):
        build(tmp_path / "step-1")
        status = killed_before_operation(number, lambda: remove_folder(tmp_path / "step-1"))
        assert not (tmp_path / "step-1").exists() or verify_folder(tmp_path / "step-1") == []
        remove_stale_temporaries(tmp_path)
        assert set(os.listdir(tmp_path)) <= {"step-1"}
    assert status == 0


# ------------------------------------------------------------------------------------------------------------------ temporaries


def test_temporaries_of_the_living_and_of_other_hosts_stay(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "mine"):
        for name in (f".tmp-a-{os.getppid()}-0a1b", ".tmp-b-4000000@elsewhere-0a1b", ".tmp-notes", ".tmp-c-4000000-0a1b"):
            (tmp_path / name).mkdir()
        remove_stale_temporaries(tmp_path)
        left = {name for name in os.listdir(tmp_path) if not name.startswith(".tmp-mine-")}
        assert left == {f".tmp-a-{os.getppid()}-0a1b", ".tmp-b-4000000@elsewhere-0a1b", ".tmp-notes"}
    assert verify_folder(tmp_path / "mine") == []


def test_stale_temporaries_of_a_folder_that_is_not_there_are_none(tmp_path: Path) -> None:
    remove_stale_temporaries(tmp_path / "nowhere")


# -------------------------------------------------------------------------------------------------------------------- verifying


def _flip_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


FAULTS = {
    "deleted": lambda file: file.unlink(),
    "emptied": lambda file: file.write_bytes(b""),
    "cut": lambda file: file.write_bytes(file.read_bytes()[:-1]),
    "extended": lambda file: file.write_bytes(file.read_bytes() + b"\0"),
    "one bit flipped": _flip_bit,
    "a folder": lambda file: (file.unlink(), file.mkdir()),
    "a pipe": lambda file: (file.unlink(), os.mkfifo(file)),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("name", ["a.txt", "inner/b.txt", MANIFEST])
def test_every_damage_to_every_file_is_found(tmp_path: Path, fault: str, name: str) -> None:
    build(tmp_path / "step-1", "some text")
    FAULTS[fault](tmp_path / "step-1" / name)
    problems = verify_folder(tmp_path / "step-1")
    if (name, fault) == (MANIFEST, "one bit flipped") or (name, fault) == (MANIFEST, "extended"):
        assert problems
    else:
        assert problems and problems[0].startswith(name)


@pytest.mark.parametrize("name", ["../x", "/etc/hostname", "inner/../../x", "", "a\0b"])
def test_a_manifest_that_names_a_file_outside_is_refused_and_the_file_not_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    (tmp_path / "x").write_text("secret")
    build(tmp_path / "step-1")
    manifest = tmp_path / "step-1" / MANIFEST
    files = json.loads(manifest.read_text())["files"]
    files[name] = {"size": 6, "sha256": hashlib.sha256(b"secret").hexdigest()}
    manifest.write_text(json.dumps({"files": files}))
    assert any("outside the folder" in problem for problem in verify_folder(tmp_path / "step-1"))


def test_links_that_leave_the_folder_and_files_that_were_added_are_found(tmp_path: Path) -> None:
    (tmp_path / "twin").write_text("new")
    build(tmp_path / "step-1")
    (tmp_path / "step-1" / "a.txt").unlink()
    (tmp_path / "step-1" / "a.txt").symlink_to(tmp_path / "twin")  # the right bytes, in the wrong place
    (tmp_path / "step-1" / "extra").write_text("")
    (tmp_path / "step-1" / "away").symlink_to(tmp_path)
    problems = verify_folder(tmp_path / "step-1")
    assert problems == ["a.txt: a link that leaves the folder", "extra: not in the manifest", "away: a link to another folder"]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"files": []}', '{"files": {"a.txt": 3}}', "[" * 100_000, "\0"])
def test_a_manifest_that_is_no_manifest_is_one_problem(tmp_path: Path, text: str) -> None:
    build(tmp_path / "step-1")
    (tmp_path / "step-1" / MANIFEST).write_text(text)
    assert verify_folder(tmp_path / "step-1") == [f"{MANIFEST}: not a manifest of sizes and checksums"]


# ------------------------------------------------------------------------------------------------------------- before the start


def test_a_folder_that_can_be_written_is_made_and_left_empty(tmp_path: Path) -> None:
    check_writable(tmp_path / "runs" / "odd name é [x] 'y'", needed_bytes=1)
    assert os.listdir(tmp_path / "runs") == ["odd name é [x] 'y'"]
    assert os.listdir(tmp_path / "runs" / "odd name é [x] 'y'") == []


def test_too_little_space_is_found_before_the_start(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match=r"GB of free space, expected at least 1e\+06 TB|TB of free space"):
        check_writable(tmp_path / "run", needed_bytes=10**18)


def test_a_file_in_the_place_of_the_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(StorageError, match=r"run: cannot make the folder: File exists. Move it away"):
        check_writable(tmp_path / "run")
    with pytest.raises(StorageError, match="cannot make the folder: Not a directory"):
        check_writable(tmp_path / "run" / "inner")


@pytest.mark.parametrize("name", ["a" * 300, "a\0b"])
def test_impossible_names_are_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(StorageError, match=r"File name too long|not a possible name"):
        check_writable(tmp_path / name)


def test_a_folder_without_the_right_to_write_is_refused() -> None:
    def try_as_nobody() -> None:
        with tempfile.TemporaryDirectory() as name:
            os.chmod(name, 0o555)
            if os.geteuid() == 0:
                os.seteuid(65534)  # permissions do not bind root
            with pytest.raises(StorageError, match=r"cannot write into the folder: Permission denied. Give yourself the right"):
                check_writable(name)
            os.seteuid(os.getuid())

    assert in_child(try_as_nobody) == 0


def test_a_clock_set_back_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(tmp_path / "step-1", "old")
    monkeypatch.setattr(time, "time", lambda: 0.0)
    build(tmp_path / "step-1")
    assert content(tmp_path / "step-1") == "new" and verify_folder(tmp_path / "step-1") == []


def _raiser(number: int):
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail
