"""Tests of the diagrams in docs/images: legible on a phone, and on light and dark pages."""

import re
from pathlib import Path
from xml.etree import ElementTree

import pytest

DIAGRAMS = sorted((Path(__file__).parent.parent / "docs" / "images").glob("*.svg"))
SVG = "{http://www.w3.org/2000/svg}"
# Width of a page's content on a phone, and the smallest legible text, in CSS pixels.
PHONE_WIDTH, MIN_FONT_SIZE = 358, 14


def luminance(color: str) -> float:
    """Returns the relative luminance of a color "#rrggbb" (WCAG 2)."""
    levels = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [x / 12.92 if x <= 0.04045 else ((x + 0.055) / 1.055) ** 2.4 for x in levels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("path", DIAGRAMS, ids=lambda path: path.stem)
def test_text_is_legible_at_phone_width(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    width, height = (float(length) for length in root.attrib["viewBox"].split()[2:])
    style = root.findtext(f"{SVG}style") or ""
    sizes = [float(size) for size in re.findall(r"(?:font-size|font): (\d+)px", style)]
    assert len(sizes) == 3
    assert min(sizes) * PHONE_WIDTH / width >= MIN_FONT_SIZE
    # All text is inside, with 10 pixels per character at most.
    for text in root.iter(f"{SVG}text"):
        anchor = {"middle": 0.5, "start": 0.0}[text.attrib["text-anchor"]]
        left = float(text.attrib["x"]) - anchor * 10 * len(text.text or "")
        assert left >= 0, text.text
        assert left + 10 * len(text.text or "") <= width, text.text
        assert 0 < float(text.attrib["y"]) < height
    assert root.findtext(f"{SVG}title")


@pytest.mark.parametrize("path", DIAGRAMS, ids=lambda path: path.stem)
def test_a_light_panel_is_behind_all_text(path: Path) -> None:
    root = ElementTree.parse(path).getroot()
    panel, *boxes = root.iter(f"{SVG}rect")
    width, height = root.attrib["viewBox"].split()[2:]
    assert float(panel.attrib["width"]) >= float(width) - 2
    assert float(panel.attrib["height"]) >= float(height) - 2
    style = (root.findtext(f"{SVG}style") or "") + "".join(
        text.attrib.get("style", "") for text in root.iter(f"{SVG}text")
    )
    fills = {box.attrib["fill"] for box in (panel, *boxes)} - {"none"}
    inks = set(re.findall(r"fill: (#\w{6})", style))
    assert len(inks) >= 2
    for ink in inks:
        for fill in fills:
            assert contrast(ink, fill) >= 4.5, (ink, fill)
