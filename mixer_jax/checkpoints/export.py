"""Export of weights to other formats; each file is read back and compared before it is renamed."""

import importlib.util
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mixer_jax.checkpoints.formats import (
    NpzFile,
    SafetensorsFile,
    TensorFile,
    write_npz,
    write_safetensors,
)
from mixer_jax.checkpoints.layouts import layout_tensors
from mixer_jax.checkpoints.model_info import ModelInfo
from mixer_jax.checkpoints.resolve import (
    CHECKPOINT_DIR,
    FORMATS,
    HUB_FILE,
    METADATA_SUFFIX,
    TIMM_CONFIG_FILE,
)
from mixer_jax.checkpoints.timm_config import make_timm_config
from mixer_jax.checkpoints.weights import PretrainedWeights, flatten_params
from mixer_jax.errors import RunError, UserError, disk_failure, missing_library_error
from mixer_jax.files import atomic_write, remove_abandoned
from mixer_jax.models.family import WeightLayout
from mixer_jax.models.registry import get_family

# Formats and the suffixes of their files; a run is a folder.
SUFFIXES = {
    "google": ".npz",
    "timm": ".safetensors",
    "orbax": "",
    "stablehlo": ".stablehlo",
    "onnx": ".onnx",
}
# Folder that timm's "local-dir:" and the Hub have: model.safetensors and config.json.
HUB_FOLDER = "hub folder"
_FOLDERS = ("orbax", HUB_FOLDER)
# Suffix that is added to a file's name for a second file: of metadata, or of a program's weights.
SIDECAR_SUFFIXES = {"google": METADATA_SUFFIX, "stablehlo": ".safetensors"}
_LOGITS_CHECK = (
    "random images, equal to the model within 1e-4 of the standard deviation of the logits"
)
_STEP = 0


class _FileFormat(NamedTuple):
    layout: str
    write: Callable[..., None]
    open: Callable[[str], TensorFile]


_FILE_FORMATS = {
    "google": _FileFormat("Google", write_npz, NpzFile),
    "timm": _FileFormat("timm", write_safetensors, SafetensorsFile),
}


def choose_format(format: str, target: str) -> str:
    """Returns the format of a target: `format`, or if empty, inferred from the target's suffix.

    "timm" is `HUB_FOLDER` for a target without a suffix of files.

    Raises:
        UserError: The suffix belongs to no format, or to another one.
    """
    if "://" in target:
        raise UserError(f"target must be a local path, got {target!r}. Copy the result afterwards.")
    if Path(target).name in SUFFIXES.values():
        raise UserError(f"target must have a name before its suffix, got {target!r}.")
    suffix = Path(target).suffix
    inferred = {end: name for name, end in SUFFIXES.items()}.get(suffix)
    if not format and inferred is None:
        suffixes = ", ".join(f"{end} ({name})" for name, end in SUFFIXES.items() if end)
        raise UserError(
            f"target must end in one of {suffixes} or have no suffix (orbax), got {target!r}. Pass "
            "--to=orbax for a folder with a dot in its name."
        )
    # The name of a folder can contain a dot.
    if format == "timm" and not target.endswith((*FORMATS, *filter(None, SUFFIXES.values()))):
        return HUB_FOLDER
    if format and inferred != format and not (format == "orbax" and inferred is None):
        rule = f"end in {SUFFIXES[format]}" if SUFFIXES[format] else "be a folder"
        rule += " or be a folder" if format == "timm" else ""
        raise UserError(f"target must {rule} for --to={format}, got {target!r}.")
    return format or str(inferred)


def target_files(format: str, target: str) -> list[str]:
    """Returns the path of a target, and that of the second file that some formats have."""
    suffixes = ["", *([SIDECAR_SUFFIXES[format]] if format in SIDECAR_SUFFIXES else [])]
    return [target + suffix for suffix in suffixes]


def check_target_available(format: str, target: str, force: bool) -> None:
    """Raises UserError if a target exists or cannot be written; `force` can replace files only.

    It cannot be written either if a library that its format needs is not installed.
    """
    if format == "onnx":
        _check_onnx_installed()
    if format not in _FOLDERS:
        for path in target_files(format, target):
            _check_folder_writable(Path(path).parent)
            if Path(path).is_dir():
                raise UserError(f"target must be a file, got the folder {path!r}.")
            if Path(path).exists() and not force:
                raise UserError(f"target {path!r} exists. Name another file, or pass --force.")
        return
    folder = Path(target).absolute()
    if folder.name == CHECKPOINT_DIR:
        raise UserError(f"target must not be named {CHECKPOINT_DIR!r}, got {target!r}.")
    if folder.is_dir() and not any(folder.iterdir()):
        # An empty folder is replaced.
        _check_folder_writable(folder.parent)
        return
    if folder.exists():
        note = " --force does not replace folders." if force else ""
        raise UserError(f"target {target!r} exists.{note} Name a new folder, or delete this one.")
    _check_folder_writable(folder.parent)


def _check_onnx_installed() -> None:
    for name in ("jax2onnx", "onnxruntime"):
        if importlib.util.find_spec(name) is None:
            raise missing_library_error("--to=onnx", f"the library {name}", '"mixer-jax[onnx]"')


def _check_folder_writable(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"target must be in an existing folder, got {str(folder)!r}.")
    if not os.access(folder, os.W_OK):
        raise UserError(f"target must be in a writable folder, got {str(folder)!r}.")


def export_weights(weights: PretrainedWeights, format: str, target: str) -> str:
    """Writes weights in another format, and returns a description of the checks that passed.

    The target appears complete or not at all: it is written to a temporary folder next to it, read
    back, compared, and moved. `check_target_available` must have accepted it.

    Raises:
        UserError: The target cannot be written, or the weights are not finite.
        WriteFailureError: The disk of the target is full or failing.
        RunError: The target differs from the weights when it is read back.
    """
    flat = dict(flatten_params(weights.params))
    for path, array in flat.items():
        with np.errstate(invalid="ignore"):
            is_finite = np.isfinite(array.sum(dtype=np.float64))
        if not is_finite:
            raise UserError(f"{path} must be finite. The run that trained it has diverged.")
    with _staged(target) as staged:
        if format == "stablehlo":
            # Imported here: files of tensors need neither JAX nor Flax.
            from mixer_jax.checkpoints.stablehlo import check_stablehlo, write_stablehlo

            sidecar = Path(f"{staged}{SIDECAR_SUFFIXES[format]}")
            write_stablehlo(str(staged), str(sidecar), weights)
            _compare_file(sidecar, SafetensorsFile, flat.items(), weights.model_info)
            check_stablehlo(str(staged), weights)
            return (
                "read the weights back, bit-identical; ran the program on batches of 1 and 3 "
                f"{_LOGITS_CHECK}"
            )
        if format == "onnx":
            from mixer_jax.checkpoints.onnx_export import check_onnx, write_onnx

            write_onnx(str(staged), weights)
            check_onnx(str(staged), weights)
            return f"ran the file in onnxruntime on batches of 1 and 3 {_LOGITS_CHECK}"
        if format == "orbax":
            _write_run(staged, weights)
            _compare_run(staged, weights)
        else:
            is_folder = format == HUB_FOLDER
            layout, write, open_file = _FILE_FORMATS["timm" if is_folder else format]
            found = _find_layout(weights.model_info, layout, flat)
            file = staged
            if is_folder:
                file = staged / HUB_FILE
                staged.mkdir()
                config = json.dumps(make_timm_config(weights.model_info), indent=2)
                atomic_write(staged / TIMM_CONFIG_FILE, config + "\n")
            write(str(file), layout_tensors(flat, found), weights.model_info.to_dict())
            _compare_file(file, open_file, layout_tensors(flat, found), weights.model_info)
        return "read back, bit-identical"


def _find_layout(model_info: ModelInfo, name: str, flat: Mapping[str, np.ndarray]) -> WeightLayout:
    """Finds a layout of the model's family that has a tensor for each parameter.

    Raises:
        UserError: There is none, or the model lacks a parameter that all models in it have.
    """
    layouts = get_family(model_info.family).weight_layouts()
    layout = next((layout for layout in layouts if layout.name == name), None)
    if layout is None:
        raise UserError(f"weights of family {model_info.family!r} have no {name} layout.")
    if missing := sorted(flat.keys() - {p for tensor in layout.tensors for p in tensor.paths}):
        raise UserError(
            f"target must have another format: {name}'s has no place for {missing[0]!r} of "
            f"{model_info.name}. Pass --to=orbax or --to=stablehlo."
        )
    if missing := sorted(layout.required - flat.keys()):
        raise UserError(
            f"target must have another format: all models in {name}'s have {missing[0]!r}, which "
            f"{model_info.name} lacks. Pass --to=orbax or --to=stablehlo."
        )
    return layout


def written_size(format: str, target: str) -> int:
    """Returns the size of a written target, in bytes."""
    files = Path(target).rglob("*") if format in _FOLDERS else target_files(format, target)
    return sum(path.stat().st_size for path in map(Path, files) if path.is_file())


@contextmanager
def _staged(target: str) -> Iterator[Path]:
    """Yields a path in a temporary folder, whose files are then moved next to `target`."""
    final = Path(target).absolute()
    folder = None
    try:
        folder = Path(tempfile.mkdtemp(prefix=f".{final.name}.draft-", dir=final.parent))
        yield folder / final.name
        # Sidecars, whose names are longer, come before the file itself.
        for path in sorted(folder.iterdir(), reverse=True):
            path.replace(final.with_name(path.name))
    except (UserError, RunError) as error:
        # Users know the target, not the temporary folder.
        raise type(error)(str(error).replace(str(folder), str(final.parent))) from error
    except Exception as error:
        if failure := disk_failure(f"target {target!r} cannot be written", error):
            if folder is not None:
                remove_abandoned(folder)
            raise failure from error
        if not isinstance(error, OSError):
            raise
        raise UserError(
            f"target {target!r} cannot be written: {error.strerror or error}."
        ) from error
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
    """Compares a written run with weights, array by array to save memory."""
    from mixer_jax.checkpoints.manager import CheckpointManager

    expected = dict(flatten_params(weights.params))
    checkpoints = CheckpointManager(str(path))
    try:
        metadata = checkpoints.metadata(_STEP)
        model_info = ModelInfo.from_metadata(metadata, str(path))
        if model_info != weights.model_info or metadata.get("config") != weights.train_config:
            raise _mismatch(path, "different metadata")
        for name, array in checkpoints.iter_restore(_STEP, "params"):
            if name not in expected:
                raise _mismatch(path, f"{name!r} is unexpected")
            _compare_bits(path, name, array, expected.pop(name))
    except UserError as error:
        raise _mismatch(path, str(error)) from error
    finally:
        checkpoints.close()
    if expected:
        raise _mismatch(path, f"{next(iter(expected))!r} is missing")


def _compare_file(
    path: Path,
    open_file: Callable[[str], TensorFile],
    tensors: Iterable[tuple[str, np.ndarray]],
    model_info: ModelInfo,
) -> None:
    """Compares a written file with weights, tensor by tensor to save memory."""
    try:
        with open_file(str(path)) as file:
            if ModelInfo.from_dict(file.metadata, str(path)) != model_info:
                raise _mismatch(path, "different metadata")
            remaining = dict(file.shapes)
            for name, tensor in tensors:
                if remaining.pop(name, None) != tensor.shape:
                    raise _mismatch(path, f"{name!r} is missing or has another shape")
                # Like the tensor, in the same order in memory.
                found = np.empty_like(tensor)
                file.read(name, found)
                _compare_bits(path, name, found, tensor)
            if remaining:
                raise _mismatch(path, f"{next(iter(remaining))!r} is unexpected")
    except UserError as error:
        raise _mismatch(path, str(error)) from error


def _compare_bits(path: Path, name: str, found: np.ndarray, expected: np.ndarray) -> None:
    # As integers, so that −0 differs from 0.
    if (
        found.shape != expected.shape
        or found.dtype != expected.dtype
        or not np.array_equal(found.view(np.uint32), expected.view(np.uint32))
    ):
        raise _mismatch(path, f"different values of {name!r}")


def _mismatch(path: Path, difference: str) -> RunError:
    return RunError(
        f"{path.name} differs from the weights when read back: {difference}. It was deleted; the "
        "disk may be failing."
    )
