"""Tests of the tables of docs/: they are what their rows make, and these what configs say."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from mixer_jax.errors import UserError
from mixer_jax.planning.tables import Table, read_rows, tables, write_tables
from tests.helpers.messages import raises


def cells(page: str) -> list[list[str]]:
    """Returns the rows of all tables of a page, without their headings, and with the versions."""
    lines = page.splitlines()
    tables = [i for i, line in enumerate(lines) if line.startswith("|---")]
    headings = {i - 1 for i in tables}
    rows = [line for i, line in enumerate(lines) if line.startswith("|") and i not in headings]
    versions = re.findall(r"\b(?:JAX|libtpu) [\d.]*\d", page)
    assert rows
    assert versions
    return [[cell.strip() for cell in row.split("|")] for row in rows] + [versions]


@pytest.fixture(scope="module")
def known() -> list[Table]:
    """The tables, with what the config files say."""
    return tables()


def test_rows_are_of_the_configs_as_they_are(known: list[Table], root: Path) -> None:
    for table in known:
        rows = read_rows(root / "docs" / f"{table.name}.json")
        old = [wanted.name for wanted in table.wanted if not wanted.is_in(rows)]
        assert not old, "compile them again: python -m mixer_jax.plan --tables=docs"


def test_pages_are_what_their_rows_make(known: list[Table], root: Path) -> None:
    for table in known:
        rows = read_rows(root / "docs" / f"{table.name}.json")
        page = (root / "docs" / f"{table.name}.md").read_text(encoding="utf-8")
        assert cells(table.page([rows[wanted.name] for wanted in table.wanted])) == cells(page)
        assert set(rows) == {wanted.name for wanted in table.wanted}


def test_settings_are_those_of_the_configs_where_these_fit(known: list[Table], root: Path) -> None:
    (results,) = [table for table in known if table.name == "plan_results"]
    rows = read_rows(root / "docs" / "plan_results.json")
    for wanted in results.wanted:
        row, configured = rows[wanted.name], wanted.configured
        assert row["num_steps"] == configured["num_steps"]
        assert row["settings"]["batch_size"] == configured["batch_size"] == 4096
        assert row["settings"]["remat"] == configured["remat"], "the config file does not fit"
        assert row["settings"]["accumulation_steps"] == configured["pieces"]


def test_a_config_that_changed_makes_a_row_old(known: list[Table], root: Path) -> None:
    rows = read_rows(root / "docs" / "plan_results.json")
    wanted = known[1].wanted[0]
    assert wanted.is_in(rows)
    changed: dict[str, Any] = wanted.configured | {"remat": "full"}
    assert not wanted._replace(configured=changed).is_in(rows)
    assert not wanted._replace(name="mixer_l16_i21k on v9:1x1").is_in(rows)


def test_nothing_is_compiled_where_all_is_there(tmp_path: Path, root: Path) -> None:
    names = [f"{name}.{end}" for name in ("plan_results", "weak_scaling") for end in ("json", "md")]
    for name in names:
        if name.endswith("json"):
            (tmp_path / name).write_bytes((root / "docs" / name).read_bytes())
    write_tables(tmp_path)
    for name in names:
        written, kept = ((folder / name).read_text("utf-8") for folder in (tmp_path, root / "docs"))
        if name.endswith("json"):
            assert written == kept
        else:
            assert cells(written) == cells(kept)


@pytest.mark.parametrize("text", ["{", json.dumps([1]), json.dumps({"a": 1}), "\x00"])
def test_broken_files_are_told(text: str, tmp_path: Path) -> None:
    (tmp_path / "weak_scaling.json").write_text(text)
    with raises(UserError, str(tmp_path / "weak_scaling.json")):
        write_tables(tmp_path)


def test_folders_that_cannot_be_written_are_told_at_once(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with raises(UserError, str(tmp_path / "file" / "weak_scaling.json")):
        write_tables(tmp_path / "file")
