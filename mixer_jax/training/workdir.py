"""The folder of a run: which config it belongs to, and whether that may go on in it."""

import json
import os
import uuid
from typing import Any

from etils import epath
from ml_collections import ConfigDict

from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, list_steps
from mixer_jax.config.config import fill_defaults, flatten
from mixer_jax.config.schema import get_field
from mixer_jax.errors import UserError
from mixer_jax.files import atomic_write

CONFIG_FILE = "config.json"


def resolve_workdir(workdir: str) -> str:
    """Returns the folder as an absolute path, or as the URL it is."""
    return workdir if "://" in workdir else os.path.abspath(os.path.expanduser(workdir))


def check_workdir(workdir: str, config: ConfigDict) -> list[str]:
    """Makes the folder and checks that a run of `config` may begin or go on in it.

    Args:
        workdir: absolute path or URL.
        config: of the run.

    Returns:
        What is set differently from before but does no harm, one line a key.

    Raises:
        UserError: the folder cannot be written, or holds checkpoints of another experiment.
    """
    _check_writable(workdir)
    saved = epath.Path(workdir) / CONFIG_FILE
    if not saved.exists():
        if list_steps(workdir):
            raise UserError(
                f"workdir {workdir!r} holds checkpoints but no {CONFIG_FILE}; "
                "choose another --workdir"
            )
        return []
    try:
        old = json.loads(saved.read_text())
        harmless, harmful = config_diff(old, config)
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise UserError(
            f"workdir {workdir!r} has a {CONFIG_FILE} that cannot be read; choose another --workdir"
        ) from error
    if harmful and list_steps(workdir):
        raise UserError(
            f"workdir {workdir!r} belongs to another experiment ({'; '.join(harmful)}); "
            "choose another --workdir, or take the change back to resume"
        )
    return harmless + harmful


def save_config(workdir: str, config: ConfigDict) -> None:
    """Writes the config as `workdir`/config.json."""
    atomic_write(epath.Path(workdir) / CONFIG_FILE, to_json(config))


def to_json(config: ConfigDict) -> str:
    """Returns the config as JSON for people and for `config_diff`."""
    return json.dumps(config.to_dict(), indent=2) + "\n"


def config_diff(old: dict[str, Any], new: ConfigDict) -> tuple[list[str], list[str]]:
    """Compares a config saved as JSON with one about to be used.

    Returns:
        Two lists of lines "key: old -> new": those harmless to a resumed run, and those that would
        make it another experiment.
    """
    before, after = flatten(ConfigDict(fill_defaults(old))), flatten(new)
    harmless: list[str] = []
    harmful: list[str] = []
    for path in sorted({*before, *after}):
        was, now = before.get(path, "(absent)"), after.get(path, "(absent)")
        if was != now:
            key = get_field(path)
            # An entry of evals that was added or taken out has all its keys changed.
            (harmless if key and key.resumable else harmful).append(f"{path}: {was!r} -> {now!r}")
    return harmless, harmful


def _check_writable(workdir: str) -> None:
    try:
        probe = epath.Path(workdir) / f".probe-{uuid.uuid4().hex}"
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except Exception as error:
        # Each kind of file system raises its own.
        reason = getattr(error, "strerror", None) or type(error).__name__
        raise UserError(
            f"workdir {workdir!r} cannot be written ({reason}); choose another --workdir"
        ) from error
    folder = epath.Path(workdir) / CHECKPOINT_DIR
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{str(folder)!r} is no folder; choose another --workdir")
