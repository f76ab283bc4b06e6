"""Tests of HTML pages that stand alone."""

import base64
import io

import jinja2
import numpy as np
import pytest
from PIL import Image

from mixer_jax.visualization.figures import make_figure
from mixer_jax.visualization.html import encode_figure, encode_thumbnail, render_page
from tests.helpers.html_pages import check_stands_alone


@pytest.mark.parametrize(
    "name", ["<script>alert(1)</script>", "\"'><img src=x onerror=y>", "שלום &amp; 🐝", "</style>"]
)
def test_render_page_shows_markup_as_text(name: str) -> None:
    page = check_stands_alone(render_page("base.html", title=name, subtitle=f"of {name}"))
    # In the title, the heading and below it.
    assert page.text.count(name) == 3
    assert page.attributes("h1", "dir") == ["auto"]


def test_render_page_shows_bytes_of_file_names_that_are_not_text() -> None:
    page = render_page("base.html", title=b"caf\xe9".decode(errors="surrogateescape"), subtitle="")
    assert r"caf\udce9" in page


def test_render_page_needs_every_variable() -> None:
    with pytest.raises(jinja2.UndefinedError, match="title"):
        render_page("base.html", subtitle="")


def decode_uri(uri: str) -> tuple[str, bytes]:
    kind, _, content = uri.partition(";base64,")
    return kind, base64.b64decode(content, validate=True)


@pytest.mark.parametrize(
    ("shape", "kind", "size"),
    [
        ((8, 6), "png", (6, 8)),
        ((64, 64), "png", (64, 64)),
        ((65, 64), "jpeg", (64, 65)),
        ((400, 800), "jpeg", (160, 80)),
        ((800, 10), "jpeg", (2, 160)),
    ],
)
def test_encode_thumbnail(shape: tuple[int, int], kind: str, size: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
    media_type, content = decode_uri(encode_thumbnail(pixels))
    assert media_type == f"data:image/{kind}"
    image = Image.open(io.BytesIO(content))
    assert image.size == size
    # Noise, which JPEG cannot compress.
    assert len(content) < 20_000
    if kind == "png":
        np.testing.assert_array_equal(np.asarray(image), pixels)


def test_encode_figure_is_reproducible() -> None:
    def encode(file_format: str) -> tuple[str, bytes]:
        figure = make_figure(2, 2)
        figure.subplots().plot([1, 2])
        return decode_uri(encode_figure(figure, file_format))

    assert encode("svg") == encode("svg")
    kind, content = encode("svg")
    assert kind == "data:image/svg+xml"
    assert b"<svg" in content
    assert encode("png")[0] == "data:image/png"
