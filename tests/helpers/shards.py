"""Tar shards in WebDataset format for tests."""

import io
import json
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tests.helpers.images import encode

# Name of a member, and its content.
Member = tuple[str, bytes]


def write_shard(path: Path, members: Iterable[Member], mtime: float = 0, **options: Any) -> None:
    """Writes an archive.

    Args:
        path: Path of the archive.
        members: Files in the archive.
        mtime: Time of all files; one with a fraction is a PAX attribute.
        **options: Options of `tarfile.open`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), mtime
            archive.addfile(info, io.BytesIO(content))


def sample(key: str, label: Any, image: bytes | None = None) -> list[Member]:
    """Makes the members of a sample: an image, and its label in KEY.cls."""
    return [(f"{key}.cls", str(label).encode()), (f"{key}.png", image or make_image(key))]


def json_sample(key: str, **fields: Any) -> list[Member]:
    """Makes the members of a sample: an image, and fields in KEY.json."""
    return [(f"{key}.json", json.dumps(fields).encode()), (f"{key}.png", make_image(key))]


def make_image(key: str, size: int = 8) -> bytes:
    """Encodes an image whose pixels depend on a key."""
    rng = np.random.default_rng(list(key.encode()))
    return encode(rng.integers(0, 256, (size, size, 3), np.uint8), "PNG")


def write_dataset(
    root: Path, counts: Mapping[str, int], num_classes: int = 10, per_shard: int = 10
) -> None:
    """Writes shards named after their split, with samples whose labels are numbers.

    Args:
        root: Folder of the shards.
        counts: Number of samples of each split.
        num_classes: Number of classes.
        per_shard: Largest number of samples per shard.
    """
    for split, count in counts.items():
        for first in range(0, count, per_shard):
            samples = [
                sample(f"{split}{number:05d}", number % num_classes)
                for number in range(first, min(first + per_shard, count))
            ]
            shard = root / f"toy-{split}-{first // per_shard:04d}.tar"
            write_shard(shard, [member for members in samples for member in members])
