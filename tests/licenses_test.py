"""Tests of docs/reference/licenses.md: it lists every package that is installed."""

import re
from pathlib import Path
from types import ModuleType

import pytest

from mixer_jax.data.wordnet import TABLE
from tests.helpers.docs_scripts import DOCS, load_docs_script
from tests.helpers.messages import mentions


@pytest.fixture(scope="module")
def licenses() -> ModuleType:
    """The script docs/licenses.py as a module."""
    return load_docs_script("licenses")


def listed_packages() -> dict[str, list[str]]:
    """Reads the names in each table of the page."""
    sections = (DOCS / "reference" / "licenses.md").read_text().split("\n## ")[1:]
    return {
        section.splitlines()[0]: re.findall(r"^\| \[(\S+)\]", section, re.MULTILINE)
        for section in sections
    }


def test_page_lists_the_packages_of_the_requirements(licenses: ModuleType, root: Path) -> None:
    listed = listed_packages()
    assert listed.pop(licenses.DATA) == []
    assert set(listed) == set(licenses.SECTIONS.values())
    files = set(licenses.SECTIONS)
    assert files == {path.name for path in root.glob("requirements*.txt")} - {
        "requirements-baselines.txt",
        "requirements-cuda.txt",
        "requirements-tpu.txt",
    }
    for file, title in licenses.SECTIONS.items():
        required = licenses.required_packages(root / file)
        assert len(required) > 10
        assert listed[title] == required


def test_license_is_read_from_expression_field_classifier_or_text(
    licenses: ModuleType, root: Path
) -> None:
    page = (root / "docs" / "reference" / "licenses.md").read_text()
    for name, expected in {
        "numpy": "BSD-3-Clause",
        "optax": "Apache-2.0",
        "certifi": "MPL-2.0",
        "jaxtyping": "MIT",
        "grain": "Apache-2.0",
        "namex": "Apache-2.0",
    }.items():
        assert expected in licenses.license_of(name)
        assert f"| {licenses.license_of(name)} |" in page


def test_page_has_the_notices_of_data_in_the_package(root: Path) -> None:
    notice = (root / "NOTICE").read_text()
    assert TABLE.relative_to(root).as_posix() in notice
    assert mentions(notice, "WordNet 3.0 Copyright 2006 by Princeton University", "timm")
    assert notice in (root / "docs" / "reference" / "licenses.md").read_text()
