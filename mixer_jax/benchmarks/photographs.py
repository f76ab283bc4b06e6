"""JPEG files to measure the input pipeline with: made here, or the user's own."""

import itertools
from pathlib import Path

import cv2
import numpy as np
import simplejpeg

from mixer_jax.errors import UserError

# ImageNet's usual size, and about its usual weight: 92 to 115 kB.
_HEIGHT, _WIDTH = 375, 500
_LEAST_BYTES = 92_000
# Of the user's files: so many that all are held in memory.
MOST_FILES = 1024


def sample_photographs(count: int, seed: int = 0) -> list[bytes]:
    """Returns random parts of scikit-learn's two photographs, 500×375, each as a JPEG file."""
    from sklearn.datasets import load_sample_images

    rng = np.random.default_rng(seed)
    photographs = itertools.cycle(load_sample_images().images)
    return [_encode(_random_part(next(photographs), rng)) for _ in range(count)]


def read_folder(folder: str) -> list[bytes]:
    """Returns the JPEG files in a folder and the folders in it, by name, at most `MOST_FILES`.

    Raises:
        UserError: there is none, or one of them is no JPEG file.
    """
    paths = sorted(p for p in Path(folder).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg"))
    if not paths:
        raise UserError(f"--images={folder} has no .jpg or .jpeg files; name a folder with some")
    files = []
    for path in paths[:MOST_FILES]:
        files.append(path.read_bytes())
        try:
            simplejpeg.decode_jpeg(files[-1], strict=False)
        except ValueError:
            raise UserError(f"--images={folder}: {path} is no readable JPEG file") from None
    return files


def _random_part(photograph: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    top = rng.integers(photograph.shape[0] - _HEIGHT + 1)
    left = rng.integers(photograph.shape[1] - _WIDTH + 1)
    return photograph[top : top + _HEIGHT, left : left + _WIDTH]


def _encode(image: np.ndarray) -> bytes:
    """Encodes at the lowest quality from 80 upwards that makes a file of the usual size."""
    for quality in range(80, 101):
        settings = [cv2.IMWRITE_JPEG_QUALITY, quality]
        encoded = cv2.imencode(".jpg", image[..., ::-1], settings)[1].tobytes()
        if len(encoded) > _LEAST_BYTES:
            break
    return encoded
