"""Resolution of checkpoint names to a run's step, a file or a Hub repository, and downloads.

Resolution reads names only; neither needs JAX or orbax.
"""

import contextlib
import re
import shutil
import socket
import tempfile
import urllib.parse
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from mixer_jax.checkpoints.best import BEST, MetricHistory, Step
from mixer_jax.errors import (
    DiskFullError,
    RunError,
    UserError,
    disk_failure,
    install_hint,
    no_space_reason,
    summarize_error,
)
from mixer_jax.files import is_integer, is_number, parse_json, read_json_lines

HUB = "hf:"
# timm's spellings of the same.
_HUB_PREFIXES = (HUB, "hf-hub:", "hf_hub:")
# Name of a Hub repository, which may have a revision: "timm/mixer_b16_224.goog_in21k@main".
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(@[\w./-]+)?", re.ASCII)
RUN = "run"
# One checkpoint of a run that was copied elsewhere.
COPY = "copy"
# Format of a file by its suffix. timm's training checkpoints end in .pth.tar but are not archives.
FORMATS = {
    ".npz": "npz",
    ".safetensors": "safetensors",
    ".pth": "torch",
    ".pt": "torch",
    ".bin": "torch",
    ".ckpt": "torch",
    ".pth.tar": "torch",
}
# URL schemes that epath reads, through TensorFlow or another library.
_SCHEMES = ("gs", "s3", "az")
# Names of the weights and of timm's config in a Hub repository, and in folders saved from it. Older
# repositories have a file of PyTorch.
HUB_FILE = "model.safetensors"
_HUB_TORCH_FILE = "pytorch_model.bin"
HUB_FILES = (HUB_FILE, _HUB_TORCH_FILE)
TIMM_CONFIG_FILE = "config.json"
# Time for which a connection to each address of the Hub is tried, in seconds.
_CONNECT_SECONDS = 5.0
# Codes of HTTP after which a retry may succeed, although those below 500 blame the request.
TRANSIENT_CODES = (408, 429)
_DOWNLOAD_ELSEWHERE = (
    f"download its {HUB_FILE} and {TIMM_CONFIG_FILE} elsewhere, and pass the folder that contains "
    "them."
)
# Suffix of the JSON file next to an npz archive that describes its model. Other programs reject an
# archive with anything but tensors in it.
METADATA_SUFFIX = ".json"
# Folder of a workdir that holds its checkpoints, one folder per step.
CHECKPOINT_DIR = "checkpoints"
# Files of a workdir with the metrics of the run, one JSON object per line, and with its config.
METRICS_FILE = "metrics.jsonl"
CONFIG_FILE = "config.json"
# Folder of a workdir that damaged checkpoints are moved to when the run resumes.
DAMAGED_DIR = "damaged_checkpoints"
# A checkpoint is complete once its folder has this file: on disks and in object stores.
INDEX = "_CHECKPOINT_METADATA"
COMMITTED = "commit_success.txt"


class CheckpointRef(NamedTuple):
    """Location of weights.

    Attributes:
        format: "run", "copy", "hub", or a value of `FORMATS`.
        path: Workdir of the run, folder of the copied checkpoint, path of the file, or name of the
            Hub repository.
        step: Step of the run's checkpoint; None for files, the Hub, and copies with another name.
    """

    format: str
    path: str
    step: int | None = None


def resolve_checkpoint(source: str, step: Step | None = None) -> CheckpointRef:
    """Resolves the name of a checkpoint.

    Args:
        source: A run's workdir or one of its checkpoints, also copied elsewhere; a file of weights;
            a folder with model.safetensors or pytorch_model.bin; or "hf:OWNER/NAME" for the Hugging
            Face Hub, also as "hf-hub:OWNER/NAME" or, unless there is such a folder, "OWNER/NAME".
            Folders and files can be URLs, such as gs://BUCKET/PATH.
        step: Step of a run's checkpoint, or "best"; None: the newest.

    Raises:
        UserError: No such checkpoint exists, or its format is unknown.
    """
    scheme, separator, _ = source.partition("://")
    if separator and scheme not in _SCHEMES and not source.startswith(_HUB_PREFIXES):
        schemes = ", ".join(f"{scheme}://" for scheme in _SCHEMES)
        raise UserError(
            f"checkpoint must be a path or a URL that starts with one of {schemes}, got "
            f"{source!r}. Download the file and pass its path."
        )
    with _access_errors(source):
        return _resolve(source, step)


def _resolve(source: str, step: Step | None) -> CheckpointRef:
    path = epath.Path(source).expanduser()
    format = next((name for suffix, name in FORMATS.items() if path.name.endswith(suffix)), None)
    prefix = next((prefix for prefix in _HUB_PREFIXES if source.startswith(prefix)), "")
    if prefix:
        name = source.removeprefix(prefix)
        # A revision can contain slashes: refs/pr/1.
        parts = name.partition("@")[0].split("/")
        if len(parts) != 2 or not all(parts):
            raise UserError(f"checkpoint on the Hub must be hf:OWNER/NAME, got {source!r}.")
        ref = CheckpointRef("hub", name)
    elif format and not path.is_dir():
        if not path.exists():
            raise UserError(f"checkpoint {source!r} does not exist. Pass a file or a workdir.")
        ref = CheckpointRef(format, str(path))
    elif path.is_file():
        raise UserError(f"checkpoint file must end in {', '.join(FORMATS)}, got {source!r}.")
    elif file := next((path / name for name in HUB_FILES if (path / name).exists()), None):
        ref = CheckpointRef(FORMATS[file.suffix], str(file))
    elif _is_copied_checkpoint(source):
        path = path if "://" in source else path.absolute()
        ref = CheckpointRef(COPY, str(path), int(path.name) if path.name.isdecimal() else None)
    elif _HUB_NAME.fullmatch(source) and not path.exists() and not path.parent.exists():
        # A name in an existing folder is rather that of a missing workdir.
        ref = CheckpointRef("hub", source)
    else:
        return CheckpointRef(RUN, *find_checkpoint(source, step))
    if step is not None:
        raise UserError(f"checkpoint {source!r} has no steps. Omit the step, or pass a workdir.")
    return ref


def _is_copied_checkpoint(source: str) -> bool:
    """Returns whether a folder is a complete checkpoint that is not in a workdir."""
    folder = epath.Path(source).expanduser()
    folder = folder if "://" in source else folder.resolve()
    return not is_checkpoint_path(folder) and (folder / _complete_mark(source)).is_file()


@contextlib.contextmanager
def _access_errors(source: str) -> Iterator[None]:
    """Raises UserError if a file or a URL cannot be accessed, WriteFailureError if a disk fails."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        _check_space(f"checkpoint {source!r}", error, "TMPDIR")
        if failure := disk_failure(f"checkpoint {source!r} cannot be accessed", error):
            raise failure from error
        # Libraries that read URLs raise errors of many types.
        if not isinstance(error, OSError) and "://" not in source:
            raise
        reason = summarize_error(error)
        raise UserError(
            f"checkpoint {source!r} cannot be accessed: {reason}.{install_hint(reason)}"
        ) from error


def _check_space(name: str, error: Exception, variable: str) -> None:
    """Raises DiskFullError if a local copy cannot be written for lack of space.

    Args:
        name: Checkpoint that is copied.
        error: Error of the copy.
        variable: Environment variable that moves the copy to another disk.
    """
    if space := no_space_reason(error):
        raise DiskFullError(
            f"{name} cannot be copied to a local disk ({space}). Free space, or set {variable} to "
            "a folder on another disk."
        ) from error


def list_steps(workdir: str) -> list[int]:
    """Returns the steps of a run's complete checkpoints, in order."""
    folder = epath.Path(workdir) / CHECKPOINT_DIR
    if not folder.is_dir():
        return []
    mark = _complete_mark(workdir)
    return sorted(
        int(entry.name)
        for entry in folder.iterdir()
        if entry.name.isdecimal() and (entry / mark).exists()
    )


def list_saved_steps(workdir: str) -> list[int]:
    """Returns the steps of a run's checkpoints that were once complete, even if damaged since.

    On a disk, the folder of a step gets its name when it is complete.
    """
    if "://" in workdir:
        return list_steps(workdir)
    folder = epath.Path(workdir) / CHECKPOINT_DIR
    entries = folder.iterdir() if folder.is_dir() else ()
    return sorted(int(entry.name) for entry in entries if entry.name.isdecimal())


def _complete_mark(path: str) -> str:
    """Returns the name of the file that marks complete checkpoints.

    On a disk, a complete save is renamed, and a partial copy lacks orbax's index. An object store
    cannot rename, and orbax marks complete saves instead.
    """
    return COMMITTED if "://" in path else INDEX


def find_checkpoint(path: str, step: Step | None = None) -> tuple[str, int]:
    """Returns the workdir and the step of a run's checkpoint; step None means the newest.

    Args:
        path: A workdir, its `checkpoints` folder, or one checkpoint in it: `checkpoints/STEP` or
            `checkpoints/best`.
        step: Step of the checkpoint, or "best".

    Raises:
        UserError: The workdir contains no checkpoint of this step, or "best" is not defined.
    """
    folder = epath.Path(path).expanduser()
    folder = folder if "://" in path else folder.resolve()
    if is_checkpoint_path(folder):
        named = BEST if folder.name == BEST else int(folder.name)
        step = named if step is None else step
        folder = folder.parent
    workdir = str(folder.parent if folder.name == CHECKPOINT_DIR else folder)
    steps = list_steps(workdir)
    if not steps:
        problem = "contains no checkpoint" if epath.Path(workdir).exists() else "does not exist"
        fix = "Pass a workdir or a file of weights."
        if runs := sorted(Path(workdir).glob(f"*/{CHECKPOINT_DIR}")):
            fix = f"Pass one of the workdirs in it, for example {runs[0].parent}."
        raise UserError(f"{path!r} {problem}. {fix}{_hint(path)}")
    if step == BEST:
        return workdir, _find_best_step(path, workdir, steps)
    if step is not None and step not in steps:
        available = ", ".join(map(str, steps))
        raise UserError(f"step of checkpoint {path!r} must be one of {available}, got {step}.")
    return workdir, steps[-1] if step is None else step


def is_checkpoint_path(path: Path | epath.Path) -> bool:
    """Returns whether a path is that of a checkpoint in a workdir: checkpoints/STEP or /best."""
    is_step = path.name.isdecimal() or (path.name == BEST and not path.exists())
    return is_step and path.parent.name == CHECKPOINT_DIR


def read_metrics(workdir: str) -> list[dict[str, Any]]:
    """Reads the lines of a run's `metrics.jsonl`, except one that a crash cut off.

    Raises:
        UserError: A line is not a JSON object of numbers with a step.
    """
    path = epath.Path(workdir) / METRICS_FILE
    lines = read_json_lines(path)
    if not all(
        is_integer(line.get("step")) and all(map(is_number, line.values())) for line in lines
    ):
        raise UserError(
            f"{str(path)!r} has lines without a step, or with values that are not numbers. Move "
            "the file away."
        )
    return lines


def _find_best_step(path: str, workdir: str, steps: list[int]) -> int:
    """Returns the step with the best logged value among those with a checkpoint.

    Raises:
        UserError: The run has no `checkpoint.best_metric`, or no value of it yet.
    """
    name = _read_best_metric(workdir)
    newest = f"Pass one of the steps {', '.join(map(str, steps))}, or no step for the newest."
    if not name:
        raise UserError(
            f"step of checkpoint {path!r} must be a number, got {BEST!r}: its run was trained "
            f"without config.checkpoint.best_metric. {newest}"
        )
    lines = read_metrics(workdir)
    best = MetricHistory(name, lines).best_step(steps)
    if best is None:
        raise UserError(
            f"step of checkpoint {path!r} must be a number, got {BEST!r}: no checkpoint has a "
            f"value of {name}. {newest}"
        )
    return best


def _read_best_metric(workdir: str) -> str:
    """Reads `checkpoint.best_metric` of a run; empty if it has none."""
    # Not at the top, since few names need it.
    from mixer_jax.config.config import fill_defaults

    path = epath.Path(workdir) / CONFIG_FILE
    if not path.exists():
        return ""
    try:
        return fill_defaults(parse_json(path.read_bytes()))["checkpoint"]["best_metric"]
    except (ValueError, AttributeError, TypeError, KeyError) as error:
        raise UserError(f"{str(path)!r} is not the config of a run.") from error


def _hint(source: str) -> str:
    """Returns a sentence about what the user may have meant instead of a workdir."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        names = sorted(path.name for path in folder.iterdir() if path.name.endswith((*FORMATS,)))
        return f" Did you mean its file {names[0]!r}?" if names else ""
    is_hub_name = _HUB_NAME.fullmatch(source) is not None
    return f" For the Hugging Face Hub, pass {HUB}{source}." if is_hub_name else ""


@contextlib.contextmanager
def local_workdir(ref: CheckpointRef) -> Iterator[tuple[str, int]]:
    """Yields the workdir and the step of a run's checkpoint.

    A copied checkpoint gets a temporary workdir with a link to it.

    Raises:
        UserError: The copy is at a URL.
    """
    if ref.format == RUN:
        assert ref.step is not None
        yield ref.path, ref.step
        return
    if "://" in ref.path:
        raise UserError(
            f"checkpoint {ref.path!r} must be in the folder {CHECKPOINT_DIR!r} of a workdir, with "
            "its step as its name. Move it, or copy it to a disk."
        )
    step = ref.step or 0
    with tempfile.TemporaryDirectory() as workdir:
        link = Path(workdir, CHECKPOINT_DIR, str(step))
        link.parent.mkdir()
        link.symlink_to(Path(ref.path).resolve())
        try:
            yield workdir, step
        except UserError as error:
            raise UserError(str(error).replace(str(link), ref.path)) from error


@contextlib.contextmanager
def local_copy(ref: CheckpointRef) -> Iterator[str]:
    """Yields a local path of a file of weights, next to which its metadata is.

    Files at URLs are downloaded for the time of the context, those on the Hub into its cache.

    Raises:
        UserError: The file cannot be downloaded.
        DiskFullError: There is no space for the local copy.
        RunError: The Hub cannot be reached, or fails.
    """
    if ref.format == "hub":
        yield _download_from_hub(ref.path)
        return
    if "://" not in ref.path:
        yield ref.path
        return
    remote = epath.Path(ref.path)
    with contextlib.ExitStack() as stack:
        with _access_errors(ref.path):
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            for name in (remote.name, TIMM_CONFIG_FILE, remote.name + METADATA_SUFFIX):
                source = remote.parent / name
                if name == remote.name or source.exists():
                    with source.open("rb") as reader, open(f"{folder}/{name}", "wb") as writer:
                        shutil.copyfileobj(reader, writer, 2**22)
        try:
            yield f"{folder}/{remote.name}"
        except UserError as error:
            # Users know the URL; the copy is already deleted when they read the message.
            raise UserError(str(error).replace(folder, str(remote.parent))) from error


def pin_revision(name: str) -> str:
    """Replaces the revision in the name of a Hub repository by the commit that it stands for now.

    Args:
        name: OWNER/NAME or OWNER/NAME@REVISION. If its files are in the local cache, the Hub is not
            asked for newer ones.

    Raises:
        UserError: The repository cannot be found.
        DiskFullError: There is no space for its config.
        RunError: The Hub cannot be reached, or fails.
    """
    from huggingface_hub import errors

    with _hub_errors(name):
        try:
            path = _get_hub_files(name, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            _check_download(name)
            path = _get_hub_file(name, TIMM_CONFIG_FILE, local_files_only=False)
    # The cache has a folder per commit.
    return f"{name.partition('@')[0]}@{Path(path).parent.name}"


def _download_from_hub(name: str) -> str:
    """Downloads a repository's weights and config into the local cache; returns the weights' path.

    Cached files are used without asking the Hub.
    """
    # Imported here: the import takes half a second that local files need not.
    from huggingface_hub import errors

    with _hub_errors(name):
        try:
            return _get_hub_files(name, local_files_only=True)
        except errors.LocalEntryNotFoundError:
            _check_download(name)
            # Both are requested again, so that they are of the same revision.
            return _get_hub_files(name, local_files_only=False)


def _get_hub_files(name: str, *, local_files_only: bool) -> str:
    from huggingface_hub import errors

    _get_hub_file(name, TIMM_CONFIG_FILE, local_files_only=local_files_only)
    try:
        return _get_hub_file(name, HUB_FILE, local_files_only=local_files_only)
    except errors.EntryNotFoundError as error:
        is_unreachable = isinstance(error, errors.LocalEntryNotFoundError)
        if is_unreachable and not local_files_only:
            raise
        return _get_hub_file(name, _HUB_TORCH_FILE, local_files_only=local_files_only)


def _get_hub_file(name: str, file: str, *, local_files_only: bool) -> str:
    import huggingface_hub

    # It would report each retry on standard error.
    huggingface_hub.logging.set_verbosity_error()
    repo, _, revision = name.partition("@")
    return huggingface_hub.hf_hub_download(
        repo, file, revision=revision or None, local_files_only=local_files_only
    )


def _check_download(name: str) -> None:
    """Raises RunError if the Hub cannot be reached."""
    check_connection(
        f"{HUB}{name} is not in the local cache",
        f"Check the network connection, or {_DOWNLOAD_ELSEWHERE}",
    )


def check_connection(problem: str, fix: str) -> None:
    """Checks that the Hub can be reached, for which its library would try for half a minute.

    Behind a proxy, and if HF_HUB_OFFLINE is set, nothing is checked.

    Args:
        problem: Start of the error's message, without a period.
        fix: Its last sentence.

    Raises:
        RunError: The Hub cannot be reached.
    """
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return
    url = urllib.parse.urlsplit(constants.ENDPOINT)
    host, port = url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443)
    if urllib.request.getproxies() and not urllib.request.proxy_bypass(host):
        return
    try:
        socket.create_connection((host, port), _CONNECT_SECONDS).close()
    except OSError as error:
        raise RunError(
            f"{problem}, and the Hub at {host} cannot be reached "
            f"({error.strerror or summarize_error(error)}). {fix}"
        ) from error


@contextlib.contextmanager
def _hub_errors(name: str) -> Iterator[None]:
    """Translates errors of the Hub's library.

    Raises:
        UserError: The repository cannot be used, or a local file cannot be written.
        DiskFullError: There is no space.
        RunError: The Hub cannot be reached, or fails.
    """
    from huggingface_hub import constants, errors

    try:
        yield
    except (UserError, RunError):
        raise
    except errors.HFValidationError as error:
        raise UserError(
            f"checkpoint on the Hub must be {HUB}OWNER/NAME, got {HUB + name!r}."
        ) from error
    except errors.LocalEntryNotFoundError as error:
        if constants.HF_HUB_OFFLINE:
            raise UserError(
                f"{HUB}{name} is not in the local cache, and HF_HUB_OFFLINE forbids downloads. "
                f"Unset it, or {_DOWNLOAD_ELSEWHERE}"
            ) from error
        raise RunError(
            f"{HUB}{name} is not in the local cache, and the Hub cannot be reached. Check the "
            f"network connection, or {_DOWNLOAD_ELSEWHERE}"
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(f"{HUB}{name} does not exist, or is private. Check the name.") from error
    except errors.EntryNotFoundError as error:
        raise UserError(
            f"{HUB}{name} must contain {TIMM_CONFIG_FILE}, and {' or '.join(HUB_FILES)}."
        ) from error
    except Exception as error:
        # Failed connections raise errors of the library that makes them.
        _check_space(f"{HUB}{name}", error, "HF_HOME")
        reason = f"{HUB}{name} cannot be downloaded: {summarize_error(error)}."
        code = getattr(getattr(error, "response", None), "status_code", 500)
        is_rejected = 400 <= code < 500 and code not in TRANSIENT_CODES
        if is_rejected or getattr(error, "filename", None) is not None:
            raise UserError(reason) from error
        raise RunError(f"{reason} Run the same command again.") from error
