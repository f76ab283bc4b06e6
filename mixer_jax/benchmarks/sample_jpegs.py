"""JPEG files to measure input pipelines with: generated, or from a folder."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from mixer_jax.errors import UserError

# ImageNet's most frequent image size, and about its usual file size: 92 to 115 kB.
_HEIGHT, _WIDTH = 375, 500
_MIN_BYTES = 92_000
# Files of a folder, all of which are held in memory.
MAX_FILES = 1024


def sample_jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Encodes random 500×375 crops of scikit-learn's two sample photographs as JPEG files."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    images = itertools.cycle(load_sample_images().images)
    return [_encode(_random_crop(next(images), rng)) for _ in range(count)]


def read_jpegs(folder: str) -> list[bytes]:
    """Reads the JPEG files in a folder and its subfolders, by name, at most `MAX_FILES`.

    Raises:
        UserError: There are none, or one of them is not a JPEG file.
    """
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"--images must be a folder with .jpg or .jpeg files, got {folder}.")
    files = []
    for path in paths[:MAX_FILES]:
        files.append(path.read_bytes())
        try:
            simplejpeg.decode_jpeg(files[-1], strict=False)
        except ValueError:
            raise UserError(f"--images={folder}: {path} is not a readable JPEG file.") from None
    return files


def _random_crop(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top = rng.integers(image.shape[0] - _HEIGHT + 1)
    left = rng.integers(image.shape[1] - _WIDTH + 1)
    return image[top : top + _HEIGHT, left : left + _WIDTH]


def _encode(image: np.ndarray) -> bytes:
    """Encodes an image at the lowest quality, from 80 on, that exceeds `_MIN_BYTES`."""
    for quality in range(80, 101):
        params = [cv2.IMWRITE_JPEG_QUALITY, quality]
        encoded = cv2.imencode(".jpg", image[..., ::-1], params)[1].tobytes()
        if len(encoded) > _MIN_BYTES:
            break
    return encoded
