"""Folder of a run: its config, and whether a run may start or resume in it."""

import contextlib
import json
import os
import re
import threading
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mixer_jax.checkpoints.resolve import (
    CHECKPOINT_DIR,
    CONFIG_FILE,
    METRICS_FILE,
    list_saved_steps,
)
from mixer_jax.config.config import fill_defaults, flatten
from mixer_jax.config.schema import RunConfig, get_field
from mixer_jax.data.names import PATH_PREFIXES
from mixer_jax.errors import RunError, UserError, disk_failure, install_hint, summarize_error
from mixer_jax.files import (
    atomic_write,
    file_lock,
    parse_json,
    read_json_lines,
    remove_temporary_files,
)
from mixer_jax.training.metrics import CURVES_FILE
from mixer_jax.training.tracking import RUN_ID_FILE

PARAMETERS_FILE = "parameters.txt"
STARTS_FILE = "starts.jsonl"
# Table of the runs of several seeds, in the folder that has their workdirs.
SEEDS_FILE = "seeds.json"
LOCK_FILE = ".lock"
# Types of what other modules read from starts.
_START_TYPES = {
    "step": int,
    "num_steps": int,
    "time": str,
    "num_devices": int,
    "device_kind": str,
    "mesh": dict,
    "versions": dict,
}
_PROBE = ".probe"
# Patterns of the files that a run writes by `atomic_write`, and the one of `check_workdir`.
_WRITTEN_FILES = (
    *(CONFIG_FILE, PARAMETERS_FILE, STARTS_FILE, METRICS_FILE, CURVES_FILE, RUN_ID_FILE),
    *("bad_images_*.jsonl", _PROBE),
)
_TRAIN_DATA_KEYS = re.compile(r"dataset\.name|mixture\.[^.]+\.dataset")
_OTHER_WORKDIR = "Choose another --workdir"
# Locked workdirs of this process, and the threads that hold them.
_locked: set[tuple[str, int]] = set()


def resolve_workdir(workdir: str) -> str:
    """Makes a path absolute, and leaves URLs as they are.

    Raises:
        UserError: The text is empty, which would be the working directory.
    """
    if not workdir:
        raise UserError(
            "workdir must not be empty, got ''. Name a folder or URL, e.g. runs/mine, or '.' for "
            "the working directory."
        )
    return workdir if "://" in workdir else os.path.abspath(os.path.expanduser(workdir))


def seed_workdir(workdir: str, seed: int) -> str:
    """Returns the workdir of one of the runs with several seeds."""
    return f"{workdir.rstrip('/')}/seed{seed}"


def check_seeds_workdir(workdir: str) -> None:
    """Raises UserError if the folder for runs of several seeds has a run itself."""
    if (epath.Path(workdir) / CONFIG_FILE).exists() or list_saved_steps(workdir):
        raise UserError(
            f"workdir {workdir!r} must not have a run itself with --seeds, whose runs are in "
            f"folders of it such as {seed_workdir(workdir, 0)}. {_OTHER_WORKDIR}."
        )


@contextlib.contextmanager
def lock_workdir(workdir: str) -> Iterator[None]:
    """Keeps other processes from training in a workdir, until the block or this process ends.

    May be nested. Object stores and some network file systems have no locks; there, it does
    nothing.

    Args:
        workdir: Absolute path or URL. It is created, and removed afterwards if it is still empty.

    Raises:
        RunError: Another process is training in the workdir, or its disk is full or failing.
        UserError: The folder cannot be written.
    """
    key = (workdir, threading.get_ident())
    if "://" in workdir or key in _locked:
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(file_lock(Path(workdir, LOCK_FILE)))
        except BlockingIOError as error:
            raise RunError(
                f"workdir {workdir!r} is {error.strerror}, which is training in it. Wait until it "
                "has finished, stop it, or choose another --workdir."
            ) from None
        except OSError as error:
            raise _not_writable(workdir, error) from error
        remove_temporary_files(Path(workdir), _WRITTEN_FILES)
        _locked.add(key)
        try:
            yield
        finally:
            _locked.remove(key)


def check_workdir(workdir: str, config: RunConfig) -> list[str]:
    """Checks that a run of `config` may start or resume in a folder, without creating it.

    Args:
        workdir: Absolute path or URL.
        config: Config of the run.

    Returns:
        A line per key that has changed since the run was last started.

    Raises:
        UserError: The folder cannot be written, or has checkpoints of another experiment.
    """
    _check_writable(workdir)
    if (epath.Path(workdir) / SEEDS_FILE).exists():
        raise UserError(
            f"workdir {workdir!r} has runs of several seeds ({SEEDS_FILE}). {_OTHER_WORKDIR}, or "
            "pass --seeds."
        )
    if not (epath.Path(workdir) / CONFIG_FILE).exists():
        if list_saved_steps(workdir):
            raise UserError(
                f"workdir {workdir!r} has checkpoints but no {CONFIG_FILE}. {_OTHER_WORKDIR}."
            )
        return []
    resumable, incompatible = config_diff(read_config(workdir), config)
    if incompatible and list_saved_steps(workdir):
        raise UserError(
            f"workdir {workdir!r} belongs to another experiment ({'; '.join(incompatible)}). "
            f"{_OTHER_WORKDIR}, or undo the change to resume."
        )
    return resumable + incompatible


def save_config(workdir: str, config: RunConfig) -> None:
    """Writes the config to `workdir`/config.json."""
    atomic_write(epath.Path(workdir) / CONFIG_FILE, to_json(config))


def read_config(workdir: str) -> dict[str, Any]:
    """Reads the config in `workdir`/config.json, as saved.

    Raises:
        UserError: The file cannot be read, or is not a config.
        WriteFailureError: The disk is failing.
    """
    try:
        config = parse_json((epath.Path(workdir) / CONFIG_FILE).read_bytes())
        # Also upgrades a copy, which fails if it is not a config.
        flatten(ConfigDict(fill_defaults(config)))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        problem = f"workdir {workdir!r} has a {CONFIG_FILE} that cannot be read"
        failure = disk_failure(problem, error)
        raise failure or UserError(f"{problem}. {_OTHER_WORKDIR}.") from error
    return config


def save_parameter_overview(workdir: str, params: dict[str, Any]) -> None:
    """Writes name, shape, dtype, size and sharding of all parameters to `workdir`."""
    from clu.parameter_overview import get_parameter_overview

    overview = get_parameter_overview(params, include_stats="sharding")
    atomic_write(epath.Path(workdir) / PARAMETERS_FILE, f"{overview}\n")


def record_start(workdir: str, start: dict[str, Any]) -> None:
    """Adds a line to `workdir`/starts.jsonl: when, where and with what a run starts or resumes.

    Raises:
        UserError: The file exists and a line is not a JSON object.
    """
    lines = [json.dumps(line) for line in [*read_starts(workdir), start]]
    atomic_write(epath.Path(workdir) / STARTS_FILE, "".join(f"{line}\n" for line in lines))


def read_starts(workdir: str) -> list[dict[str, Any]]:
    """Reads the lines of a run's `starts.jsonl`; empty for runs of older versions.

    Raises:
        UserError: A line is not a JSON object, or a value has another type than in a start.
    """
    path = epath.Path(workdir) / STARTS_FILE
    starts = read_json_lines(path)
    for start in starts:
        for name, kind in _START_TYPES.items():
            if name in start and not isinstance(start[name], kind):
                raise UserError(f"{str(path)!r} is not a log of starts. Move the file away.")
    return starts


def to_json(config: RunConfig) -> str:
    """Formats a config as JSON."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def config_diff(old: dict[str, Any], new: RunConfig) -> tuple[list[str], list[str]]:
    """Compares a config saved as JSON with a new one.

    Returns:
        Two lists of lines "key: old -> new": keys that a resumed run may change, and keys that make
        it another experiment.
    """
    before = flatten(ConfigDict(fill_defaults(old)))
    after = flatten(ConfigDict(new.to_dict()))
    resumable: list[str] = []
    incompatible: list[str] = []
    for path in sorted({*before, *after}):
        was, now = before.get(path, "(absent)"), after.get(path, "(absent)")
        if was != now:
            # All keys of an entry of evals that was added or removed have changed.
            field = get_field(path)
            is_resumable = (field and field.resumable) or _is_folder_moved(path, was, now)
            changes = resumable if is_resumable else incompatible
            changes.append(f"{path}: {was!r} -> {now!r}")
    return resumable, incompatible


def moved_folders(old: dict[str, Any], new: RunConfig) -> list[str]:
    """Returns a line "key: old -> new" for each dataset with another path than in `old`."""
    before = flatten(ConfigDict(fill_defaults(old)))
    after = flatten(ConfigDict(new.to_dict()))
    return [
        f"{path}: {was!r} -> {after[path]!r}"
        for path, was in before.items()
        if path in after and was != after[path] and _is_folder_moved(path, was, after[path])
    ]


def _is_folder_moved(key: str, was: Any, now: Any) -> bool:
    """Returns whether a key of the training data has a path in the same format before and after.

    Whether the same images are there is compared later, by the fingerprint of the data.
    """
    is_path = any(
        all(isinstance(name, str) and name.startswith(prefix) for name in (was, now))
        for prefix in PATH_PREFIXES
    )
    return is_path and _TRAIN_DATA_KEYS.fullmatch(key) is not None


def _check_writable(workdir: str) -> None:
    try:
        folder = epath.Path(workdir)
        # Object stores have no folders. Elsewhere a usage error must not leave an empty one behind.
        while "://" not in workdir and not folder.exists():
            folder = folder.parent
        probe = folder / f"{_PROBE}.{uuid.uuid4().hex}.tmp"
        probe.write_text("")
        # The start of a run in the workdir may have removed it. See `lock_workdir`.
        probe.unlink(missing_ok=True)
    except Exception as error:
        # Every file system raises its own exceptions.
        raise _not_writable(workdir, error) from error
    folder = epath.Path(workdir) / CHECKPOINT_DIR
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} must be a folder. {_OTHER_WORKDIR}.")


def _not_writable(workdir: str, error: Exception) -> UserError | RunError:
    if failure := disk_failure(f"workdir {workdir!r} cannot be written", error):
        return failure
    if isinstance(error, ImportError):
        # File systems of URLs need a library each.
        reason = summarize_error(error)
        return UserError(f"workdir {workdir!r} cannot be accessed: {reason}.{install_hint(reason)}")
    reason = getattr(error, "strerror", None) or type(error).__name__
    return UserError(f"workdir {workdir!r} cannot be written ({reason}). {_OTHER_WORKDIR}.")
