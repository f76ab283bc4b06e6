"""HTML page of predictions: a thumbnail of each image, and its classes as bars."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Sequence

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.image_files import NamedImage
from mixer_jax.inference import Prediction
from mixer_jax.visualization.html import encode_thumbnail, render_page


class Thumbnails:
    """Thumbnails of images, made as they are read for classification.

    Attributes:
        images: The images to classify; reading one makes its thumbnail.
    """

    def __init__(self, images: Iterable[NamedImage], exif_orientation: bool):
        """Wraps the readers of images.

        Args:
            images: Names, and functions that read the bytes.
            exif_orientation: Whether thumbnails are rotated by the EXIF orientation.
        """
        self._exif_orientation = exif_orientation
        self._uris: dict[int, str] = {}
        self.images: list[NamedImage] = [
            (name, functools.partial(self._read, index, read))
            for index, (name, read) in enumerate(images)
        ]

    def __getitem__(self, index: int) -> str:
        """Returns the data URI of an image that was read; empty if it cannot be decoded."""
        return self._uris.get(index, "")

    def _read(self, index: int, read: Callable[[], bytes]) -> bytes:
        encoded = read()
        # Classification reports it, if the part that it needs is damaged.
        with contextlib.suppress(BadImageError):
            pixels = decode(encoded, exif_orientation=self._exif_orientation)
            self._uris[index] = encode_thumbnail(pixels)
        return encoded


def render_prediction_page(
    predictions: Sequence[Prediction],
    thumbnails: Thumbnails,
    *,
    model: str,
    checkpoint: str,
    num_found: int,
) -> str:
    """Renders the page of some predictions.

    Args:
        predictions: Predictions of all images of `thumbnails`, in order.
        thumbnails: Thumbnails of the images.
        model: Name of the model.
        checkpoint: Name of its weights.
        num_found: Number of images of which these are the first.
    """
    return render_page(
        "predictions.html",
        title=f"Predictions of {model}",
        subtitle=checkpoint,
        num_bad=sum(bool(prediction.error) for prediction in predictions),
        num_found=num_found,
        images=[(prediction, thumbnails[index]) for index, prediction in enumerate(predictions)],
    )
