"""Where weights lie: what the name of a checkpoint means; reads names only, so it costs nothing."""

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from etils import epath

from mixer_jax.errors import UserError, summarize_error

HUB = "hf:"
RUN = "run"
# Kinds of files, by the end of their names.
FORMATS = {
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    # timm's training checkpoints; they are no tar archives.
    ".pth.tar": "torch",
}
# Of URLs that epath reads, either through TensorFlow or through a library of their own.
_SCHEMES = ("gs", "s3", "az")
# How the latter is installed, where it is asked for.
_EXTRAS = {"gcsfs": 'pip install "mixer-jax[gcs]"'}
# What the Hugging Face Hub, and folders saved from it, call the file of weights.
HUB_FILE = "model.safetensors"
# In a run's folder, and in that of a checkpoint which is complete.
CHECKPOINT_DIR = "checkpoints"
COMMITTED = "commit_success.txt"
INDEX = "_CHECKPOINT_METADATA"


class CheckpointRef(NamedTuple):
    """Where weights lie.

    Attributes:
        format: "run", "hub", or one of the kinds of files.
        path: of the run or the file; of the Hub, the repository's name.
        step: of a run.
    """

    format: str
    path: str
    step: int | None = None


def resolve_checkpoint(source: str, step: int | None = None) -> CheckpointRef:
    """Returns where weights lie.

    Args:
        source: a run's folder or one of its checkpoints; a file of published weights; a folder that
            holds model.safetensors; or "hf:OWNER/NAME" of the Hugging Face Hub. Folders and files
            may lie at a URL, gs://BUCKET/PATH or s3://BUCKET/PATH.
        step: which checkpoint of a run; None: the newest.

    Raises:
        UserError: there is nothing, or nothing that is known.
    """
    scheme, separator, _ = source.partition("://")
    if separator and scheme not in _SCHEMES and not source.startswith(HUB):
        known = ", ".join(f"{known}://" for known in _SCHEMES)
        raise UserError(
            f"checkpoint {source!r} is at a URL that is not read; download the file and name it, "
            f"or name a place at one of {known}"
        )
    with _reaching(source):
        return _find(source, step)


def _find(source: str, step: int | None) -> CheckpointRef:
    if source.startswith(HUB):
        name = source.removeprefix(HUB)
        # The revision, if any, may have more of them: refs/pr/1.
        parts = name.partition("@")[0].split("/")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"checkpoint {source!r} is no name on the Hub; write hf:OWNER/NAME")
        place = CheckpointRef("hub", name)
    elif (kind := _kind(source)) and not _path(source).is_dir():
        if not _path(source).exists():
            raise UserError(f"checkpoint {source!r} does not exist; name a file or a run's folder")
        place = CheckpointRef(kind, str(_path(source)))
    elif _path(source).is_file():
        known = ", ".join(FORMATS)
        raise UserError(f"checkpoint {source!r} is of no known kind; files end in {known}")
    elif (_path(source) / HUB_FILE).exists():
        place = CheckpointRef(FORMATS[Path(HUB_FILE).suffix], str(_path(source) / HUB_FILE))
    else:
        return CheckpointRef(RUN, *find_checkpoint(source, step))
    if step is not None:
        raise UserError(f"checkpoint {source!r} has no steps, for it is no run; leave out the step")
    return place


def _kind(source: str) -> str | None:
    name = epath.Path(source).name
    return next((kind for end, kind in FORMATS.items() if name.endswith(end)), None)


@contextlib.contextmanager
def _reaching(source: str) -> Iterator[None]:
    """Tells what goes wrong on the way to a file or a URL as a user's error."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        # Behind a URL is a library of its own, with errors of its own.
        if not isinstance(error, OSError) and "://" not in source:
            raise
        reason = summarize_error(error)
        fixes = [f"; {fix}" for library, fix in _EXTRAS.items() if library in reason]
        raise UserError(
            f"checkpoint {source!r} cannot be reached: {reason}{''.join(fixes)}"
        ) from error


def _path(source: str) -> epath.Path:
    return epath.Path(source).expanduser()


@contextlib.contextmanager
def local_copy(path: str, companions: tuple[str, ...]) -> Iterator[str]:
    """Gives the path itself, or where it is a URL that of a copy, for as long as it is used.

    Args:
        path: of a file.
        companions: names of files beside it, copied too where they exist.
    """
    if "://" not in path:
        yield path
        return
    remote = epath.Path(path)
    with tempfile.TemporaryDirectory() as folder:
        with _reaching(path):
            for name in (remote.name, *companions):
                source = remote.parent / name
                if name == remote.name or source.exists():
                    with source.open("rb") as from_, open(f"{folder}/{name}", "wb") as to:
                        shutil.copyfileobj(from_, to, 2**22)
        try:
            yield f"{folder}/{remote.name}"
        except UserError as error:
            # The copy is gone when this is read.
            raise UserError(str(error).replace(folder, str(remote.parent))) from error


def list_steps(workdir: str) -> list[int]:
    """Returns the steps of a run's complete checkpoints, in order."""
    folder = epath.Path(workdir) / CHECKPOINT_DIR
    if not folder.is_dir():
        return []
    complete = (
        int(entry.name)
        for entry in folder.iterdir()
        # A disk renames a finished save, and what was copied half lacks orbax's index; an object
        # store cannot rename, and gets a mark.
        if entry.name.isdecimal() and (entry / (COMMITTED if "://" in workdir else INDEX)).exists()
    )
    return sorted(complete)


def find_checkpoint(path: str, step: int | None = None) -> tuple[str, int]:
    """Returns a checkpoint as (run, step).

    Args:
        path: of a run, of its `checkpoints` folder, or of one checkpoint in it.
        step: which checkpoint of a run; None: the newest.

    Raises:
        UserError: nothing there, or not this step.
    """
    place = epath.Path(path).expanduser()
    place = place if "://" in path else place.resolve()
    if place.name.isdecimal() and place.parent.name == CHECKPOINT_DIR:
        step = int(place.name) if step is None else step
        place = place.parent
    run = str(place.parent if place.name == CHECKPOINT_DIR else place)
    steps = list_steps(run)
    if not steps:
        raise UserError(f"checkpoint {path!r} holds no checkpoint; name a run's folder")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"checkpoint {path!r} has no step {step}; it has {known}")
    return run, steps[-1] if step is None else step
