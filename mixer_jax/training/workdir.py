"""Folder of a run: its config, and whether a run may start or resume in it."""

import json
import os
import uuid
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, list_steps
from mixer_jax.config.config import fill_defaults, flatten
from mixer_jax.config.schema import RunConfig, get_field
from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write

CONFIG_FILE = "config.json"
_OTHER_WORKDIR = "Choose another --workdir"


def resolve_workdir(workdir: str) -> str:
    """Makes a path absolute, and leaves URLs as they are."""
    return workdir if "://" in workdir else os.path.abspath(os.path.expanduser(workdir))


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
    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        if list_steps(workdir):
            raise UserError(
                f"workdir {workdir!r} has checkpoints but no {CONFIG_FILE}. {_OTHER_WORKDIR}."
            )
        return []
    try:
        resumable, incompatible = config_diff(json.loads(path.read_text()), config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"workdir {workdir!r} has a {CONFIG_FILE} that cannot be read. {_OTHER_WORKDIR}."
        ) from error
    if incompatible and list_steps(workdir):
        raise UserError(
            f"workdir {workdir!r} belongs to another experiment ({'; '.join(incompatible)}). "
            f"{_OTHER_WORKDIR}, or undo the change to resume."
        )
    return resumable + incompatible


def save_config(workdir: str, config: RunConfig) -> None:
    """Writes the config to `workdir`/config.json."""
    atomic_write(epath.Path(workdir) / CONFIG_FILE, to_json(config))


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
            changes = resumable if field and field.resumable else incompatible
            changes.append(f"{path}: {was!r} -> {now!r}")
    return resumable, incompatible


def _check_writable(workdir: str) -> None:
    try:
        folder = epath.Path(workdir)
        # Object stores have no folders. Elsewhere a usage error must not leave an empty one behind.
        while "://" not in workdir and not folder.exists():
            folder = folder.parent
        probe = folder / f".probe-{uuid.uuid4().hex}"
        probe.write_text("")
        probe.unlink()
    except Exception as error:
        # Every file system raises its own exceptions.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"workdir {workdir!r} cannot be written ({reason}). {_OTHER_WORKDIR}."
        ) from error
    folder = epath.Path(workdir) / CHECKPOINT_DIR
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} must be a folder. {_OTHER_WORKDIR}.")
