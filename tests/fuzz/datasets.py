"""Targets that open datasets: manifests, Parquet and Arrow files, tar shards, and TFDS datasets."""

import contextlib
import functools
import io
import json
import os
import shutil
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

from mixer_jax.data.builders import imagenet21k
from mixer_jax.data.conversion import convert_dataset
from mixer_jax.data.decode import BadImageError
from mixer_jax.data.huggingface import open_hugging_face
from mixer_jax.data.manifest import list_manifest_splits, open_manifest
from mixer_jax.data.preparation import INFO_FILE, UNDECODABLE, format_splits
from mixer_jax.data.source import Source
from mixer_jax.data.tfds import open_tfds, prepare_tfds
from mixer_jax.data.webdataset import open_webdataset
from tests.fuzz.mutation import (
    mutate,
    mutate_cells,
    mutate_json,
    mutate_json_lines,
    mutate_tar,
    mutate_text,
    mutate_zip,
)
from tests.fuzz.target import Target
from tests.helpers.images import encode, noise
from tests.helpers.shards import json_sample, sample, write_shard

_PNG = encode(noise(4, 5), "PNG")
# Time of the last change that an index stores.
_SHARD_TIME = 1_000_000_000
_TFDS_NAME = "photos"
_TFDS_FOLDER = f"{_TFDS_NAME}/1.0.0"


def _read(source: Source) -> None:
    """Reads all examples, of which any may be bad."""
    source.fingerprint()
    assert all(isinstance(name, str) for name in source.class_names)
    assert all(len(note.splitlines()) == 1 for note in source.notes), source.notes
    for index in range(min(len(source), 50)):
        try:
            example = source.examples[index]
        except BadImageError as error:
            if "\n" in str(error):
                raise AssertionError(f"not one line: {error}") from error
            continue
        assert all(0 <= label < source.num_classes for label in example["labels"])


def _open_manifest(suffix: str, data: bytes, folder: Path) -> None:
    path = folder / f"data{suffix}"
    path.write_bytes(data)
    for name in ("a", "b", "c"):
        (folder / f"{name}.png").write_bytes(_PNG)
    for split in list_manifest_splits(str(path)):
        _read(open_manifest(str(path), split))


_CSV = [
    b"path,label\na.png,x\nb.png,y\nc.png,x\n",
    b"path,label,split\na.png,1,train\nb.png,2,train\nc.png,1,test\n",
    b'path,labels,other\na.png,x|y,"1"\nb.png,,2\nc.png,y,3\n',
]
_JSONL = [
    b'{"path": "a.png", "label": "x"}\n{"path": "b.png", "label": "y"}\n',
    b'{"path": "a.png", "label": 3}\n{"path": "b.png", "label": 7}\n',
    b'{"path": "a.png", "labels": ["x", 1], "split": "train"}\n'
    b'{"path": "b.png", "labels": [], "split": "train"}\n'
    b'{"path": "c.png", "labels": ["x"], "split": "test"}\n',
]


@functools.cache
def _parquet_seeds() -> Sequence[bytes]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    def write(**columns: Any) -> bytes:
        buffer = io.BytesIO()
        pq.write_table(pa.table(columns), buffer)
        return buffer.getvalue()

    images = [{"bytes": _PNG, "path": f"{k}.png"} for k in range(3)]
    return [
        write(image=pa.array(images), label=pa.array([0, 1, 0])),
        write(image=pa.array([_PNG] * 3), label=pa.array(["x", None, "y"])),
        write(image=pa.array(images), labels=pa.array([["x"], [], ["y", "x"]])),
    ]


@functools.cache
def _arrow_seeds() -> Sequence[bytes]:
    """Makes an input per file of a saved dataset: a line with its name, and the contents."""
    seeds = []
    for path in sorted(_saved_dataset().rglob("*")):
        if path.is_file():
            name = path.relative_to(_saved_dataset()).as_posix()
            seeds.append(name.encode() + b"\n" + path.read_bytes())
    return seeds


@functools.cache
def _saved_dataset() -> Path:
    import datasets

    features = {"image": datasets.Image(), "label": datasets.ClassLabel(names=["dog", "cat"])}
    rows = {"image": [{"bytes": _PNG, "path": None}] * 3, "label": [0, 1, 0]}
    folder = Path(tempfile.mkdtemp(), "saved")
    with _use_cache(Path(tempfile.mkdtemp())):
        dataset = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
        datasets.DatasetDict({"train": dataset}).save_to_disk(folder)
    return folder


@contextlib.contextmanager
def _use_cache(folder: Path) -> Iterator[None]:
    """Keeps Arrow files out of the user's cache, and prevents requests to the Hub."""
    with (
        mock.patch("datasets.config.HF_DATASETS_CACHE", str(folder)),
        mock.patch("huggingface_hub.constants.HF_HUB_OFFLINE", True),
    ):
        yield


def _open_parquet(data: bytes, folder: Path) -> None:
    root = folder / "parquet"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "train.parquet").write_bytes(data)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    with _use_cache(folder / "cache"):
        _read(open_hugging_face(str(root), "train"))


def _open_arrow(data: bytes, folder: Path) -> None:
    name, _, content = data.partition(b"\n")
    root = folder / "saved"
    shutil.rmtree(root, ignore_errors=True)
    shutil.copytree(_saved_dataset(), root)
    (root / name.decode()).write_bytes(content)
    with _use_cache(folder / "cache"):
        _read(open_hugging_face(str(root), "train"))


def _mutate_named(data: bytes, rng: np.random.Generator) -> bytes:
    """Mutates the contents after the name of a file."""
    name, _, content = data.partition(b"\n")
    is_json = name.endswith(b".json") and rng.random() < 0.8
    return name + b"\n" + (mutate_json if is_json else mutate)(content, rng)


def _tar(write: Callable[[Path], None]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "x.tar")
        write(path)
        return path.read_bytes()


@functools.cache
def _tar_seeds() -> Sequence[bytes]:
    plain = [*sample("a", 0, _PNG), *sample("b", 1, _PNG), *sample("c", "x" * 120, _PNG)]
    fields = [*json_sample("a", label="dog"), *json_sample("b/" + "c" * 150, label=["cat", "dog"])]
    return [
        _tar(lambda path: write_shard(path, plain)),
        _tar(lambda path: write_shard(path, fields, mtime=0.5, format=tarfile.PAX_FORMAT)),
        _tar(lambda path: write_shard(path, fields, format=tarfile.GNU_FORMAT)),
    ]


def _open_shard(data: bytes, folder: Path) -> None:
    root = folder / "shards"
    shutil.rmtree(root, ignore_errors=True)
    root.mkdir()
    (root / "train.tar").write_bytes(data)
    _read(open_webdataset(str(root), "train"))


@functools.cache
def _index_seeds() -> Sequence[bytes]:
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "train.tar").write_bytes(_tar_seeds()[0])
        os.utime(Path(folder, "train.tar"), (_SHARD_TIME, _SHARD_TIME))
        open_webdataset(folder, "train")
        return [Path(folder, "mixer_jax_index.npz").read_bytes()]


def _open_with_index(data: bytes, folder: Path) -> None:
    """Opens a shard with an index that counts as current."""
    root = folder / "indexed"
    root.mkdir(exist_ok=True)
    (root / "train.tar").write_bytes(_tar_seeds()[0])
    os.utime(root / "train.tar", (_SHARD_TIME, _SHARD_TIME))
    (root / "mixer_jax_index.npz").write_bytes(data)
    _read(open_webdataset(str(root), "train"))


def _mutate_index(data: bytes, rng: np.random.Generator) -> bytes:
    with np.load(io.BytesIO(data)) as stored:
        arrays = dict(stored)
    metadata = json.loads(arrays["metadata"].tobytes())
    match int(rng.integers(5)):
        case 0:
            return mutate(data, rng)
        case 1:
            return mutate_zip(data, rng)
        case 2:
            samples = arrays["samples"]
            field = samples.dtype.names[int(rng.integers(len(samples.dtype.names)))]
            values = (0, 1, -1, 2**31 - 1, -(2**31), 100, 512)
            row = int(rng.integers(len(samples)))
            samples[field][row : row + int(rng.integers(1, 3))] = np.array(
                values[int(rng.integers(len(values)))]
            ).astype(samples.dtype[field])
        case 3:
            arrays["names"] = arrays["names"][: int(rng.integers(len(arrays["names"]) + 1))]
        case _:
            text = mutate_json(json.dumps(metadata).encode(), rng)
            arrays["metadata"] = np.frombuffer(text, np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def _open_with_file(name: str, data: bytes, folder: Path) -> None:
    """Opens a shard next to a file that describes its dataset."""
    root = folder / name
    root.mkdir(exist_ok=True)
    write_shard(root / "train.tar", sample("a", 1, _PNG))
    (root / name).write_bytes(data)
    _read(open_webdataset(str(root), "train"))


def _read_archive(data: bytes, folder: Path) -> None:
    """Reads an archive of archives as `prepare` does ImageNet-21k."""
    path = folder / "winter21_whole.tar.gz"
    path.write_bytes(data)
    imagenet21k._list_synsets(path)
    for file in imagenet21k._iter_files(path):
        assert len(file.content) <= len(data)


@functools.cache
def _archive_seeds() -> Sequence[bytes]:
    inner = _tar(lambda path: write_shard(path, [("n00000001_1.JPEG", _PNG)]))
    members = [("n00000001.tar", inner), ("n00000002.tar", b"")]
    return [_tar(lambda path: write_shard(path, members))]


@functools.cache
def _tfds_dataset() -> Path:
    """Converts two images, one of which cannot be decoded, and returns the folder of TFDS."""
    folder = Path(tempfile.mkdtemp())
    for index in range(6):
        path = folder / f"images/{index % 2}/{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(_PNG if index else b"not an image")
    with contextlib.redirect_stderr(io.StringIO()):
        convert_dataset(f"folder:{folder}/images", _TFDS_NAME, f"{folder}/tfds")
    return folder / "tfds"


def _tfds_file(name: str) -> bytes:
    return (_tfds_dataset() / _TFDS_FOLDER / name).read_bytes()


def _open_tfds_with_file(name: str, data: bytes, folder: Path) -> None:
    """Opens a prepared dataset, and reads it for training as well as `prepare` does."""
    data_dir = folder / "tfds"
    shutil.rmtree(data_dir, ignore_errors=True)
    shutil.copytree(_tfds_dataset(), data_dir)
    (data_dir / _TFDS_FOLDER / name).write_bytes(data)
    builder, _ = prepare_tfds(_TFDS_NAME, str(data_dir))
    format_splits(builder).encode()
    _read(open_tfds(_TFDS_NAME, "train", str(data_dir)))


TARGETS = [
    Target(
        "manifest: CSV", lambda: _CSV, functools.partial(_open_manifest, ".csv"), mutate_cells, 5
    ),
    Target(
        "manifest: JSONL",
        lambda: _JSONL,
        functools.partial(_open_manifest, ".jsonl"),
        mutate_json_lines,
        5,
    ),
    Target("hf: Parquet", _parquet_seeds, _open_parquet, mutate, 200),
    Target("hf: saved dataset", _arrow_seeds, _open_arrow, _mutate_named, 50),
    Target("wds: shard", _tar_seeds, _open_shard, mutate_tar, 10),
    Target("wds: index", _index_seeds, _open_with_index, _mutate_index, 20),
    Target(
        "wds: _info.json",
        lambda: [b'{"splits": {"train": {"name": "train", "filenames": ["train.tar"]}}}'],
        functools.partial(_open_with_file, "_info.json"),
        mutate_json,
        5,
    ),
    Target(
        "wds: classnames.txt",
        lambda: [b"dog\ncat\n"],
        functools.partial(_open_with_file, "classnames.txt"),
        mutate_text,
        10,
    ),
    Target("prepare: ImageNet-21k", _archive_seeds, _read_archive, mutate_tar),
    *(
        Target(
            f"tfds: {name}",
            functools.partial(lambda name: [_tfds_file(name)], name),
            functools.partial(_open_tfds_with_file, name),
            mutator,
            cost=20,
        )
        for name, mutator in ((INFO_FILE, mutate_json), (UNDECODABLE, mutate_text))
    ),
]
