"""How large the images of a data set are."""

import statistics

from mixer_jax.data.decode import BadImageError, decode
from mixer_jax.data.source import Source

_LOOKED_AT = 16


def median_image_area(source: Source) -> float:
    """Returns the median area of some images spread over a source, square pixels.

    Images that cannot be used are passed over; 0 if all are.

    Args:
        source: of encoded images.
    """
    areas = []
    for number in range(min(_LOOKED_AT, len(source))):
        try:
            example = source.examples[number * len(source) // min(_LOOKED_AT, len(source))]
            height, width = decode(example["image"]).shape[:2]
        except BadImageError:
            continue
        areas.append(height * width)
    return statistics.median(areas) if areas else 0.0
