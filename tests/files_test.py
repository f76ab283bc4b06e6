"""Tests of atomic writes, of growing files, and of locks between programs."""

import errno
import fcntl
import os
import shlex
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from etils import epath

from mixer_jax.errors import UserError
from mixer_jax.files import (
    LineFile,
    atomic_folder,
    atomic_target,
    atomic_write,
    file_lock,
    is_locked,
    name_file,
    read_json_lines,
)
from tests.helpers.messages import mentions, raises
from tests.helpers.object_store import BUCKET, object_store
from tests.helpers.sync_log import log_syncs

HOLD_LOCK = """
import sys, time
from pathlib import Path
from mixer_jax.files import file_lock
with file_lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(60)
"""
APPEND_LINES = """
import sys
from pathlib import Path
from mixer_jax.files import file_lock
folder = Path(sys.argv[1])
for _ in range(20):
    with file_lock(folder / ".lock", wait=True) as held:
        assert held
        count = int((folder / "count").read_text())
        (folder / "count").write_text(str(count + 1))
"""


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("path_type", [Path, epath.Path])
def test_atomic_write_by_several_threads_leaves_one_whole_file(
    path_type: Any, tmp_path: Path
) -> None:
    path = path_type(tmp_path / "a.json")
    texts = [str(number) * 50_000 for number in range(8)]
    failed = []

    def write(text: str) -> None:
        for _ in range(20):
            try:
                atomic_write(path, text)
            except OSError as error:
                failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    seen = set()
    while any(thread.is_alive() for thread in threads):
        if path.exists():
            seen.add(path.read_text())
    assert failed == []
    assert path.read_text() in texts
    assert seen <= set(texts)
    assert names(tmp_path) == ["a.json"]


def test_atomic_write_keeps_the_old_file_on_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = epath.Path(tmp_path / "a.json")
    atomic_write(path, "old")

    def fail(temporary: Any, target: Any) -> None:
        raise OSError("the disk is full")

    monkeypatch.setattr(type(path), "replace", fail)
    with pytest.raises(OSError, match="the disk is full"):
        atomic_write(path, "new")
    assert names(tmp_path) == ["a.json"]
    assert path.read_text() == "old"


def test_errors_of_writes_and_syncs_name_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LineFile(epath.Path(tmp_path / "log"), [])
    (tmp_path / "log").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space") as caught:
        file.append("line")
    assert caught.value.filename == str(tmp_path / "log")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output") as caught:
        atomic_write(tmp_path / "a.json", "new")
    assert str(caught.value.filename).startswith(f"{tmp_path}/a.json.")
    assert names(tmp_path) == ["log"]


def test_name_file_names_the_causes_of_errors_and_keeps_other_names(tmp_path: Path) -> None:
    # As of `shutil.rmtree`, relative to a folder that it has opened.
    names = [None, "relative", "/other"]
    errors = [OSError(errno.EIO, "failed", name) for name in names]
    with pytest.raises(ValueError, match="saving"), name_file(tmp_path):
        raise ValueError("saving") from ExceptionGroup("several", errors)
    assert [error.filename for error in errors] == [str(tmp_path), str(tmp_path), "/other"]


def test_files_that_cannot_be_removed_cause_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "unlink", refuse)
    with file_lock(tmp_path / ".lock") as held:
        assert held
    with file_lock(tmp_path / ".lock") as held:
        assert held
    with pytest.raises(KeyError), atomic_target(tmp_path / "weights"):
        raise KeyError
    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(OSError, match="Read-only") as caught:
        atomic_write(tmp_path / "a.json", "new")
    assert caught.value.__context__ is None


def test_atomic_write_syncs_the_contents_before_the_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_syncs(monkeypatch)
    atomic_write(tmp_path / "file", "new")
    (event, temporary), *others = log.events
    assert (event, Path(temporary).name[:5]) == ("sync", "file.")
    assert others == [("rename", str(tmp_path / "file")), ("sync", str(tmp_path))]


def test_line_file_syncs_its_lines_when_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LineFile(epath.Path(tmp_path / "log"), ["first"])
    file.append("second")
    log = log_syncs(monkeypatch)
    file.flush()
    assert log.events == [("sync", str(tmp_path / "log"))]


def test_line_file_syncs_its_name_when_it_is_first_flushed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = LineFile(epath.Path(tmp_path / "log"), [])
    file.flush()
    file.append("first")
    log = log_syncs(monkeypatch)
    file.flush()
    file.append("second")
    file.flush()
    path = str(tmp_path / "log")
    assert log.events == [("sync", path), ("sync", str(tmp_path)), ("sync", path)]


def test_file_lock_syncs_the_names_of_new_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = log_syncs(monkeypatch)
    with file_lock(tmp_path / "runs" / "mine" / ".lock"):
        assert {path for _, path in log.events} == {str(tmp_path), str(tmp_path / "runs")}


def test_atomic_write_encodes_text_as_utf_8(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a", "×")
    atomic_write(tmp_path / "b", b"\xff")
    assert (tmp_path / "a").read_bytes() == b"\xc3\x97"
    assert (tmp_path / "b").read_bytes() == b"\xff"


def test_atomic_target_replaces_the_file_and_keeps_its_usual_mode(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")
    usual = stat.S_IMODE(path.stat().st_mode)
    with atomic_target(path) as temporary:
        temporary.unlink()
        temporary.touch(mode=0o600)
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert stat.S_IMODE(path.stat().st_mode) == usual
    assert names(tmp_path) == ["weights"]


def test_atomic_target_keeps_the_old_file_on_failure(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_text("old")

    def fail_half_way() -> None:
        with atomic_target(path) as temporary:
            temporary.write_text("ne")
            raise KeyError

    with pytest.raises(KeyError):
        fail_half_way()
    assert path.read_text() == "old"
    assert names(tmp_path) == ["weights"]


def test_file_lock_of_a_killed_program_is_released(tmp_path: Path) -> None:
    path = tmp_path / "folder" / ".lock"
    command = [sys.executable, "-c", HOLD_LOCK, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stdout.readline() == "held\n"
        before = time.monotonic()
        with pytest.raises(BlockingIOError) as caught, file_lock(path):
            pass
        assert time.monotonic() - before < 5
        assert str(path) in str(caught.value)
        process.kill()
    with file_lock(path) as held:
        assert held
    assert names(path.parent) == []


def test_file_lock_lets_programs_take_turns(tmp_path: Path) -> None:
    (tmp_path / "count").write_text("0")
    command = [sys.executable, "-c", APPEND_LINES, str(tmp_path)]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert (tmp_path / "count").read_text() == "60"
    assert names(tmp_path) == ["count"]


def test_file_lock_is_released_by_an_exception(tmp_path: Path) -> None:
    with pytest.raises(KeyError), file_lock(tmp_path / ".lock"):
        raise KeyError
    with file_lock(tmp_path / ".lock") as held:
        assert held


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
@pytest.mark.parametrize("wait", [False, True])
def test_file_lock_is_not_held_on_a_file_system_without_locks(
    code: int, wait: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: object) -> None:
        raise OSError(code, "no locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with file_lock(tmp_path / ".lock", wait=wait) as held:
        assert not held


def test_file_lock_in_a_folder_that_cannot_be_created(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"), file_lock(tmp_path / "file" / ".lock"):
        pass


def test_line_file_on_a_disk_is_appended_to(tmp_path: Path) -> None:
    path = epath.Path(tmp_path / "log")
    (tmp_path / "log").write_text("one\nold\ncut o")
    file = LineFile(path, ["one"])
    assert path.read_text() == "one\n"
    inode = (tmp_path / "log").stat().st_ino
    file.append("two", "drei é")
    file.append("four")
    # At once, and without copying the lines before.
    assert path.read_text() == "one\ntwo\ndrei é\nfour\n"
    assert (tmp_path / "log").stat().st_ino == inode
    file.flush()
    file.close()
    assert names(tmp_path) == ["log"]


def test_line_file_without_lines_is_not_created(tmp_path: Path) -> None:
    LineFile(epath.Path(tmp_path / "log"), []).close()
    assert names(tmp_path) == []
    with object_store(tmp_path) as store:
        LineFile(epath.Path(f"{BUCKET}log"), []).close()
    assert (names(tmp_path), store.num_uploads) == ([], 0)


def test_line_file_on_an_object_store_is_written_now_and_then(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        file = LineFile(epath.Path(f"{BUCKET}log"), ["0"], interval=3600)
        for number in range(1, 1000):
            file.append(f"{number}")
        file.flush()
        assert (tmp_path / "log").read_text().split() == [str(k) for k in range(1000)]
        # When it was opened, at the first line, and at the end.
        assert store.num_uploads <= 3
        file.flush()
        assert store.num_uploads <= 3
        file.append("1000")
        file.close()
        assert (tmp_path / "log").read_text().split()[-1] == "1000"
    assert names(tmp_path) == ["log"]


def test_line_file_does_not_wait_for_an_object_store(tmp_path: Path) -> None:
    with object_store(tmp_path) as store:
        file = LineFile(epath.Path(f"{BUCKET}log"), [], interval=0)
        uploading, may_finish = threading.Event(), threading.Event()

        def wait() -> None:
            uploading.set()
            assert may_finish.wait(60)

        store.before_upload = wait
        file.append("one")
        assert uploading.wait(60)
        # If these waited for the upload, the test would fail by the timeout above.
        file.append("two")
        file.append("three")
        may_finish.set()
        file.flush()
    assert (tmp_path / "log").read_text() == "one\ntwo\nthree\n"


def test_line_file_writes_again_what_an_object_store_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise ConnectionError("service unavailable")

    with object_store(tmp_path) as store:
        file = LineFile(epath.Path(f"{BUCKET}log"), [], interval=0)
        store.before_upload = fail
        file.append("one")
        with pytest.raises(ConnectionError):
            file.flush()
        store.before_upload = lambda: None
        file.append("two")
        file.flush()
        assert (tmp_path / "log").read_text() == "one\ntwo\n"
        store.before_upload = fail
        file.append("three")
        # It must not hide the error that ends a run.
        file.close()
    assert mentions(capsys.readouterr().err, f"{BUCKET}log", "1", "service unavailable")


PRINT_LIMIT = """
import resource
from mixer_jax.data import tfds
tfds.{call}
print(*resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("function", "hard", "expected"),
    [
        ("open_tfds('digits', 'test', {!r})", 8000, "4096 8000"),
        ("open_tfds('digits', 'test', {!r})", 2000, "2000 2000"),
        ("prepare_tfds('digits', {!r})", 8000, "4096 8000"),
    ],
)
def test_reading_and_preparing_data_raises_the_limit_on_open_files(
    digits_dir: str, function: str, hard: int, expected: str
) -> None:
    code = PRINT_LIMIT.format(call=function.format(digits_dir))
    script = f"ulimit -Sn 500; ulimit -Hn {hard}; exec {shlex.join([sys.executable, '-c', code])}"
    done = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout == f"{expected}\n"


def test_read_json_lines_leaves_out_a_line_that_is_cut_off(tmp_path: Path) -> None:
    path = epath.Path(tmp_path / "log.jsonl")
    assert read_json_lines(path) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert read_json_lines(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(b'{"a": "\xff"}\n')
    with raises(UserError, str(path)):
        read_json_lines(path)


def test_is_locked_recognizes_programs_that_run_here(tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    assert is_locked(path) is False
    with file_lock(path):
        assert is_locked(path) is True
    assert is_locked(path) is False
    path.write_text("")
    assert is_locked(path) is None


@pytest.mark.parametrize("exists", [False, True])
def test_atomic_folder_appears_with_all_of_its_files(exists: bool, tmp_path: Path) -> None:
    path = tmp_path / "report"
    if exists:
        path.mkdir()
    with atomic_folder(path) as folder:
        (folder / "a").write_text("a")
        assert exists == path.exists()
    assert names(tmp_path) == ["report"]
    assert names(path) == ["a"]
    (tmp_path / "other").mkdir()
    modes = {stat.S_IMODE(other.stat().st_mode) for other in tmp_path.iterdir()}
    assert len(modes) == 1


def test_atomic_folder_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write(error: BaseException | None = None) -> None:
        with atomic_folder(tmp_path / "report") as folder:
            (folder / "a").write_text("a")
            if error:
                raise error

    with pytest.raises(KeyboardInterrupt):
        write(KeyboardInterrupt())
    assert names(tmp_path) == []
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "old").touch()
    with pytest.raises(OSError, match="report"):
        write()
    assert names(tmp_path) == ["report"]
    assert names(tmp_path / "report") == ["old"]
