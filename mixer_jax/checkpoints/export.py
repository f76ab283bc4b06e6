"""Weights into files of other formats, each read back and compared before it gets its name."""

import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixer_jax.checkpoints import tree
from mixer_jax.checkpoints.formats.base import TensorFile, check_target
from mixer_jax.checkpoints.formats.npz import METADATA_SUFFIX, NpzFile, write_npz
from mixer_jax.checkpoints.formats.safetensors import SafetensorsFile, write_safetensors
from mixer_jax.checkpoints.layouts import GOOGLE, TIMM, WeightLayout, layout_views
from mixer_jax.checkpoints.load import PretrainedWeights
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.errors import RunError, UserError

# Formats, and how the names of their files end; a run is a folder.
SUFFIXES = {"google": ".npz", "timm": ".safetensors", "orbax": "", "stablehlo": ".stablehlo"}
# Of a format's file, how another beside it ends: what says of weights what they are, or the weights
# that a program takes.
SIDECAR_SUFFIXES = {"google": METADATA_SUFFIX, "stablehlo": ".safetensors"}
_STEP = 0


class _File(NamedTuple):
    layout: WeightLayout
    write: Callable[..., None]
    open: Callable[[str], TensorFile]


_FILES = {
    "google": _File(GOOGLE, write_npz, NpzFile),
    "timm": _File(TIMM, write_safetensors, SafetensorsFile),
}


def choose_format(to: str, target: str) -> str:
    """Returns the format of a target.

    Args:
        to: a name of `SUFFIXES`; empty: as the target's ending tells.
        target: path of a file or folder.

    Raises:
        UserError: the ending tells no format, or another one.
    """
    if "://" in target:
        raise UserError(f"{target!r} is a URL; name a local file or folder, and copy it there")
    if Path(target).name in SUFFIXES.values():
        raise UserError(f"{target!r} is an ending without a name; put a name before it")
    ending = Path(target).suffix
    told = {end: name for name, end in SUFFIXES.items()}.get(ending)
    known = ", ".join(f"{end} for {name}" for name, end in SUFFIXES.items() if end)
    if not to and told is None:
        raise UserError(
            f"{target!r} ends in {ending}, which tells no format; endings are {known}, and none "
            "for orbax: or pass --to=orbax"
        )
    # A folder may have a dot in its name.
    if to and told != to and not (to == "orbax" and told is None):
        wanted = f"a name ending in {SUFFIXES[to]}" if SUFFIXES[to] else "a folder's name"
        raise UserError(f"--to={to} contradicts the name {target!r}; give it {wanted}")
    return to or str(told)


def check_target_available(to: str, target: str, force: bool) -> None:
    """Raises UserError if something is in the way of a target, or it cannot be written.

    Args:
        to: its format.
        target: path of a file or folder.
        force: whether a file may be replaced; a folder never is.
    """
    if to != "orbax":
        check_target(target, force)
        if to in SIDECAR_SUFFIXES:
            check_target(target + SIDECAR_SUFFIXES[to], force)
        return
    folder = Path(target).absolute()
    if folder.name == CHECKPOINT_DIR:
        raise UserError(
            f"{target!r}: a run holds a folder {CHECKPOINT_DIR!r} and cannot be called so"
        )
    if folder.is_dir() and not any(folder.iterdir()):
        # It is moved into place, as a file is: of it, too, the folder above must be writable.
        folder = folder / folder.name
    if folder.exists():
        replaced = ", which --force does not replace" if force else ""
        raise UserError(f"{target!r} exists{replaced}; name a new folder, or remove this one")
    check_target(str(folder), force=False)


def export_weights(weights: PretrainedWeights, to: str, target: str) -> str:
    """Writes weights in another format.

    The target is there only if all is well, and whole: it is written in a folder beside it, read
    back, compared, and moved.

    Args:
        weights: to write.
        to: a name of `SUFFIXES`.
        target: path of a file or folder that `check_target_available` accepted.

    Returns:
        What was compared, for people.

    Raises:
        UserError: it cannot be written, or the weights are damaged.
        RunFailedError: what was written is not what is read back.
    """
    for path, array in tree.flatten(weights.params):
        with np.errstate(invalid="ignore"):
            finite = np.isfinite(array.sum(dtype=np.float64))
        if not finite:
            raise UserError(f"{path} has numbers that are not finite; the run went wrong")
    with _staged(target) as draft:
        if to == "stablehlo":
            # Imported here: files of tensors need neither JAX nor Flax.
            from mixer_jax.checkpoints.stablehlo import check_stablehlo, write_stablehlo

            beside = Path(f"{draft}{SIDECAR_SUFFIXES[to]}")
            write_stablehlo(str(draft), str(beside), weights)
            _compare_file(beside, SafetensorsFile, dict(tree.flatten(weights.params)), weights)
            check_stablehlo(str(draft), weights)
            return (
                "weights read back, the same bit for bit; program run beside the model on 1 and on "
                "3 random images, the same to 1e-4 of the spread"
            )
        if to == "orbax":
            _write_run(draft, weights)
            _compare_run(draft, weights)
        else:
            layout, write, open_file = _FILES[to]
            flat = dict(tree.flatten(weights.params))
            views = dict(layout_views(flat, layout))
            write(str(draft), views.items(), weights.model_info.to_dict())
            _compare_file(draft, open_file, views, weights)
        return "read back, the same bit for bit"


def written_size(to: str, target: str) -> int:
    """Returns the bytes of a written target."""
    if to != "orbax":
        beside = Path(target + SIDECAR_SUFFIXES.get(to, ""))
        return sum(path.stat().st_size for path in {Path(target), beside})
    return sum(path.stat().st_size for path in Path(target).rglob("*") if path.is_file())


@contextmanager
def _staged(target: str) -> Iterator[Path]:
    """Gives a path in a new folder; what is there in the end is moved beside `target` and to it."""
    final = Path(target).absolute()
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.draft-", dir=final.parent))
        yield folder / final.name
        # What tells of a file, of a longer name, comes before it.
        for path in sorted(folder.iterdir(), reverse=True):
            path.replace(final.with_name(path.name))
    except (UserError, RunError) as error:
        # People know the target, and not the folder that is about to be gone.
        raise type(error)(str(error).replace(str(folder), str(final.parent))) from error
    except OSError as error:
        raise UserError(f"{target!r} cannot be written: {error.strerror or error}") from error
    finally:
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _write_run(path: Path, weights: PretrainedWeights) -> None:
    from mixer_jax.checkpoints.manager import save_params_streaming

    metadata = {"model_info": weights.model_info.to_dict(), "ema": False}
    if weights.train_config is not None:
        metadata["config"] = weights.train_config
    save_params_streaming(str(path), _STEP, weights.params, metadata)


def _compare_run(path: Path, weights: PretrainedWeights) -> None:
    """Compares a run with weights, array by array, for both need not be in memory whole."""
    from mixer_jax.checkpoints.manager import CheckpointManager

    wanted = dict(tree.flatten(weights.params))
    checkpoints = CheckpointManager(str(path))
    try:
        metadata = checkpoints.metadata(_STEP)
        _compare_about(path.name, ModelInfo.from_metadata(metadata, str(path)), weights.model_info)
        if metadata.get("config") != weights.train_config:
            raise _differ(path.name, "it says that another run trained its weights")
        for name, array in checkpoints.iter_restore(_STEP, "params"):
            if name not in wanted:
                raise _differ(path.name, "it has other parameters")
            _compare_bits(path.name, name, array, wanted.pop(name))
    except UserError as error:
        raise _differ(path.name, str(error)) from error
    finally:
        checkpoints.close()
    if wanted:
        raise _differ(path.name, "it lacks parameters")


def _compare_file(
    path: Path,
    open_file: Callable[[str], TensorFile],
    views: dict[str, np.ndarray],
    weights: PretrainedWeights,
) -> None:
    """Compares a file with weights, tensor by tensor, for both need not be in memory whole."""
    try:
        with open_file(str(path)) as file:
            _compare_about(path.name, ModelInfo.from_dict(file.said, str(path)), weights.model_info)
            if file.shapes != {tensor: view.shape for tensor, view in views.items()}:
                raise _differ(path.name, "it has other tensors, or tensors of other shapes")
            for tensor, view in views.items():
                # Of the same order in memory as the view.
                found = np.empty_like(view)
                file.read(tensor, found)
                _compare_bits(path.name, tensor, found, view)
    except UserError as error:
        raise _differ(path.name, str(error)) from error


def _compare_about(where: str, found: ModelInfo, wanted: ModelInfo) -> None:
    if found != wanted:
        raise _differ(where, "it says other things of its weights")


def _compare_bits(where: str, name: str, found: np.ndarray, wanted: np.ndarray) -> None:
    # As whole numbers: −0 is not 0 here.
    if (
        found.shape != wanted.shape
        or found.dtype != wanted.dtype
        or not np.array_equal(found.view(np.uint32), wanted.view(np.uint32))
    ):
        raise _differ(where, f"{name!r} has other numbers")


def _differ(where: str, what: str) -> RunError:
    return RunError(
        f"{where} is not what was written: {what}; it is removed, and the disk may be failing"
    )
