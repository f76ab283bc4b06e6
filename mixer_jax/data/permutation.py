"""Fixed permutations of the pixels of all images (Section 3.4, Figure 4)."""

import dataclasses
import functools

import numpy as np

from mixer_jax.config.schema import PreprocessConfig

PATCHES, PIXELS = "patches", "pixels"


@dataclasses.dataclass(frozen=True)
class PixelPermutation:
    """One permutation of pixels, the same for all images of a size.

    Attributes:
        kind: "patches" permutes the patches, and the pixels within all patches in the same way;
            "pixels" permutes all pixels of the image.
        patch_size: Side of the patches, in pixels; not used by "pixels".
        seed: Seed that the permutation is drawn from.
    """

    kind: str
    patch_size: int
    seed: int

    @classmethod
    def from_config(cls, config: PreprocessConfig) -> "PixelPermutation | None":
        """Reads the permutation of a config, if it has one."""
        if config.permute == "none":
            return None
        return cls(config.permute, config.permute_patch_size, config.permute_seed)

    def __call__(self, image: np.ndarray) -> np.ndarray:
        """Permutes the pixels of an image (height, width, channels) into a new array."""
        height, width, channels = image.shape
        indices = pixel_indices(self, height, width)
        return image.reshape(-1, channels)[indices].reshape(image.shape)


@functools.lru_cache
def pixel_indices(permutation: PixelPermutation, height: int, width: int) -> np.ndarray:
    """Returns the flat index of the source pixel of every pixel, (height * width,).

    For "patches", height and width must be multiples of the patch size.
    """
    bits = np.random.Philox(key=permutation.seed)
    if permutation.kind == PIXELS:
        return _random_order(bits, height * width)
    size = permutation.patch_size
    rows, columns = height // size, width // size
    patches, pixels = _random_order(bits, rows * columns), _random_order(bits, size**2)
    flat = np.arange(height * width).reshape(rows, size, columns, size)
    by_patch = flat.transpose(0, 2, 1, 3).reshape(rows * columns, size**2)
    permuted = by_patch[patches][:, pixels].reshape(rows, columns, size, size)
    return permuted.transpose(0, 2, 1, 3).ravel()


def _random_order(bits: np.random.Philox, size: int) -> np.ndarray:
    """Draws a permutation of range(size).

    NumPy keeps the raw output of a bit generator between versions, and that of `permutation` not.
    """
    return np.argsort(bits.random_raw(size), kind="stable")
