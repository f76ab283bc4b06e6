"""HTML pages that stand alone: one file without scripts, whose images and styles are inline."""

import base64
import functools
import io
from typing import Any

import jinja2
import numpy as np
from jaxtyping import UInt8

from mixer_jax.visualization.figures import render_figure

# Side in pixels up to which an image is stored without loss, as JPEG would blur its few pixels.
_MAX_LOSSLESS = 64
_JPEG_QUALITY = 80
_MEDIA_TYPES = {"svg": "image/svg+xml", "png": "image/png", "jpeg": "image/jpeg"}


def render_page(template: str, **context: Any) -> str:
    """Renders a template of the folder `templates`.

    Every value is escaped, so that names cannot add markup. A variable that the template uses and
    the context lacks raises `jinja2.UndefinedError`.

    Args:
        template: Name of a file that extends `base.html`.
        context: Variables of the template: `title`, `subtitle`, and its own.
    """
    page = _environment().get_template(template).render(context)
    # Names of files can contain bytes that are not UTF-8, which Python represents by surrogates.
    return page.encode(errors="backslashreplace").decode()


@functools.cache
def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("mixer_jax.visualization"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def encode_thumbnail(pixels: UInt8[np.ndarray, "h w 3"], max_side: int = 160) -> str:
    """Encodes an image as a data URI, reduced until no side exceeds `max_side` pixels.

    Images of up to 64 pixels are stored as PNG, others as JPEG of about 5 KB.
    """
    from PIL import Image

    image = Image.fromarray(pixels)
    image.thumbnail((max_side, max_side))
    file_format = "png" if max(image.size) <= _MAX_LOSSLESS else "jpeg"
    buffer = io.BytesIO()
    image.save(buffer, file_format, quality=_JPEG_QUALITY)
    return _data_uri(buffer.getvalue(), file_format)


def encode_figure(figure: Any, file_format: str = "svg") -> str:
    """Encodes a figure of Matplotlib as a data URI.

    Args:
        figure: Figure from `make_figure`.
        file_format: "svg", or "png" for figures of many points or of pixels.
    """
    return _data_uri(render_figure(figure, file_format), file_format)


def _data_uri(content: bytes, file_format: str) -> str:
    return f"data:{_MEDIA_TYPES[file_format]};base64,{base64.b64encode(content).decode()}"
