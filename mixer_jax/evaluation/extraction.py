"""Extraction of features to a file: streamed in parts, and resumed where it was stopped.

Parts and the request are kept in a folder next to the output until the output is complete.
"""

import contextlib
import dataclasses
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from mixer_jax.checkpoints.weights import PretrainedWeights, params_digest
from mixer_jax.data.readers import BadImage
from mixer_jax.data.source import Example, Examples, Source, subset
from mixer_jax.errors import RunError, UserError, abbreviate
from mixer_jax.evaluation.feature_files import WRITERS, Contents, Part, Parts, write_part
from mixer_jax.evaluation.features import check_finite, make_layer_fn
from mixer_jax.evaluation.loop import DatasetPass, EvalInputConfig, bad_images_error
from mixer_jax.files import atomic_write, file_lock, output_errors, parse_json

_REQUEST_FILE = "request.json"
# Largest part, in bytes (one batch may have more) and in batches. A stop loses one part at most.
_PART_BYTES, _MAX_PART_BATCHES = 2**26, 32


class Extraction(NamedTuple):
    """Features to extract.

    Attributes:
        weights: Weights on the host.
        model: Module with the weights' architecture.
        source: Images; without class names, they have no labels.
        layers: Names of activations.
        pool: Whether activations are averaged over tokens or positions.
    """

    weights: PretrainedWeights
    model: Any
    source: Source
    layers: tuple[str, ...]
    pool: bool

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Returns the shape of each layer's activations in the output, without that of images."""
        known = self.weights.model_info.layers()
        shapes = {name: known[name].shape for name in self.layers}
        return {name: shape[-1:] if self.pool else shape for name, shape in shapes.items()}

    def request(self, batch_size: int) -> dict[str, Any]:
        """Returns everything that determines the output, as plain data."""
        info = self.weights.model_info.to_dict()
        del info["class_names"]
        return {
            "weights": params_digest(self.weights.params),
            "model": info,
            "dtype": self.model.execution.dtype,
            "layers": list(self.layers),
            "pool": "mean" if self.pool else "none",
            "data": self.source.name,
            "num_examples": len(self.source),
            "files": self.source.fingerprint(),
            "batch_size": batch_size,
        }


class ExtractionResult(NamedTuple):
    """Counts of an extraction that is complete.

    Attributes:
        num_images: Images in the output.
        bad_images: Name and reason of each image that was left out.
        num_resumed: Images that were read from parts of an earlier process, bad ones included.
    """

    num_images: int
    bad_images: list[tuple[str, str]]
    num_resumed: int


def extract_to_file(
    extraction: Extraction,
    params: Any,
    mesh: Mesh,
    input_config: EvalInputConfig,
    out: Path,
    *,
    force: bool = False,
    on_progress: Callable[[int], object] = lambda num_images: None,
) -> ExtractionResult:
    """Writes the activations of every image of a source to a file, each once and in order.

    Args:
        extraction: What to extract.
        params: Parameters on the devices of `mesh`.
        mesh: Devices of this host.
        input_config: Input pipeline.
        out: Output file, whose suffix is a key of `WRITERS`.
        force: Whether to discard the parts of an unfinished extraction with another request.
        on_progress: Callback with the number of images in each finished part, bad ones included.

    Raises:
        UserError: Images are unusable and must not be skipped, none is usable, activations are not
            finite, or an unfinished extraction with the same output has another request.
        RunError: Another process writes the same output.
        OutputWriteError, WriteFailureError: The output cannot be written.
    """
    folder = out.with_name(f"{out.name}.parts")
    batch_size = math.ceil(input_config.batch_size / mesh.size) * mesh.size
    request = extraction.request(batch_size)
    part_size = _part_size(extraction.shapes(), batch_size)
    source = extraction.source
    paths = [folder / f"{index:06}.npz" for index in range(math.ceil(len(source) / part_size))]
    with _lock(out):
        # Versions of this module may differ in the size of parts.
        _begin(folder, out, request | {"part_size": part_size}, force)
        done = next((i for i, path in enumerate(paths) if not path.exists()), len(paths))
        num_resumed = min(done * part_size, len(source))
        on_progress(num_resumed)
        parts = _compute_parts(extraction, params, mesh, input_config, num_resumed, part_size)
        for path, part in zip(paths[done:], parts, strict=True):
            with output_errors(str(out)):
                write_part(path, part)
            on_progress(len(part.names) + len(part.bad_images))
        found = Parts(paths)
        bad = found.bad_images()
        if bad and not input_config.skip_bad:
            raise bad_images_error(source, [BadImage(*image) for image in bad], len(bad))
        if not found.num_images:
            raise UserError(f"{source.name} has no usable image. Choose other images.")
        multi_label, class_names = source.multi_label, source.class_names
        contents = Contents(extraction.shapes(), class_names, multi_label, request)
        with output_errors(str(out)):
            _assemble(folder / f"assembled{out.suffix}", out, found, contents)
        shutil.rmtree(folder, ignore_errors=True)
    return ExtractionResult(found.num_images, bad, num_resumed)


def _part_size(shapes: dict[str, tuple[int, ...]], batch_size: int) -> int:
    """Returns the number of images in a part: whole batches."""
    bytes_per_image = sum(4 * math.prod(shape) for shape in shapes.values())
    num_batches = _PART_BYTES // (bytes_per_image * batch_size)
    return batch_size * min(max(num_batches, 1), _MAX_PART_BATCHES)


def _assemble(temporary: Path, out: Path, parts: Parts, contents: Contents) -> None:
    """Writes the output to a file in the folder of parts, which is removed later, and moves it."""
    try:
        WRITERS[out.suffix](temporary, parts, contents)
        temporary.replace(out)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _lock(out: Path) -> Iterator[None]:
    """Keeps other processes from writing the same output."""
    with contextlib.ExitStack() as stack:
        with output_errors(str(out)):
            try:
                stack.enter_context(file_lock(out.with_name(f".{out.name}.lock")))
            except BlockingIOError as error:
                raise RunError(
                    f"{out} is {error.strerror}, which is writing it. Wait until it has finished, "
                    "stop it, or choose another output."
                ) from None
        yield


def _begin(folder: Path, out: Path, request: dict[str, Any], force: bool) -> None:
    """Creates the folder of parts, or checks that its parts have the same request."""
    path = folder / _REQUEST_FILE
    old: Any = None
    if any(folder.glob("*.npz")):
        with contextlib.suppress(OSError, ValueError):
            old = parse_json(path.read_bytes())
        if old != request and not force:
            raise UserError(
                f"{folder} must have parts of the same request, got those of another "
                f"({abbreviate(_describe_changes(old, request))}). Repeat that request, choose "
                "another --out, or pass --force to start over."
            )
    with output_errors(str(out)):
        if old != request and folder.exists():
            shutil.rmtree(folder)
        folder.mkdir(exist_ok=True)
        # Left by a process that was killed.
        for temporary in folder.glob("*.tmp"):
            temporary.unlink()
        atomic_write(path, json.dumps(request, indent=2) + "\n")


def _describe_changes(old: Any, new: dict[str, Any]) -> list[str]:
    """Lists what differs between two requests, with the old value if it is short."""
    if not isinstance(old, dict) or not isinstance(old.get("model"), dict):
        return ["unknown"]
    old, new = ({**x, **x["model"], "model": ""} for x in (old, new))
    changed = [key for key in new if old.get(key) != new[key]]
    return [
        key if isinstance(new[key], dict) or key == "weights" else f"{key}: {old.get(key)}"
        for key in changed
    ]


def _compute_parts(
    extraction: Extraction,
    params: Any,
    mesh: Mesh,
    input_config: EvalInputConfig,
    start: int,
    part_size: int,
) -> Iterator[Part]:
    """Yields the parts from the image at position `start`, a multiple of `part_size`."""
    source = extraction.source
    if start == len(source):
        return
    examples = _RecordingExamples(source.examples)
    remaining = subset(
        dataclasses.replace(source, examples=examples, multi_label=False),
        range(start, len(source)),
    )
    fn = make_layer_fn(extraction.model, mesh, extraction.layers, extraction.pool)
    dataset_pass = DatasetPass(fn, params, remaining, mesh, input_config._replace(skip_bad=True))
    bad_images = iter(dataset_pass.bad)
    builder = _PartBuilder(source, extraction.layers)
    for layers, mask in dataset_pass:
        stop = min(start + len(mask), len(source))
        for row, position in enumerate(range(start, stop)):
            record = examples.take(position)
            if mask[row]:
                builder.records.append(record)
            else:
                # Reported in the order of their positions.
                builder.bad_images.append(next(bad_images))
        rows = np.flatnonzero(mask)
        for name, array in layers.items():
            selected = np.asarray(array)[rows]
            check_finite(source.name, selected)
            builder.arrays[name].append(selected)
        start = stop
        if start % part_size == 0 or start == len(source):
            yield builder.build()
            builder = _PartBuilder(source, extraction.layers)


class _PartBuilder:
    """Images of a part so far."""

    def __init__(self, source: Source, layers: tuple[str, ...]):
        self.records: list[tuple[str, tuple[int, ...]]] = []
        self.bad_images: list[BadImage] = []
        self.arrays: dict[str, list[np.ndarray]] = {name: [] for name in layers}
        self._source = source

    def build(self) -> Part:
        """Concatenates the arrays."""
        names = [name for name, _ in self.records]
        labels = None
        if self._source.multi_label:
            labels = np.zeros((len(names), self._source.num_classes), np.bool_)
            for row, (_, indices) in enumerate(self.records):
                labels[row, list(indices)] = True
        elif self._source.class_names:
            labels = np.array([index for _, (index,) in self.records], np.int64)
        layers = {name: np.concatenate(arrays) for name, arrays in self.arrays.items()}
        return Part(names, labels, layers, [(bad.name, bad.reason) for bad in self.bad_images])


class _RecordingExamples(Examples):
    """Examples whose names and labels are kept until they are taken.

    The input pipeline reads each example once, in threads, and masks those without a label: here
    all have the label 0.
    """

    def __init__(self, examples: Any):
        self._examples = examples
        self._records: dict[int, tuple[str, tuple[int, ...]]] = {}

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        example = self._examples[index]
        self._records[index] = (example["name"], example["labels"])
        return Example(image=example["image"], labels=(0,), name=example["name"])

    def take(self, index: int) -> tuple[str, tuple[int, ...]]:
        """Returns the name and the labels of an example that was read, once."""
        return self._records.pop(index, ("", ()))
