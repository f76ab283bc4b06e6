"""Tables of plans in docs/: rows match the configs, pages match the rows."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from mixer_jax.errors import UserError
from tests.helpers.docs_scripts import DOCS, load_docs_script
from tests.helpers.messages import raises


@pytest.fixture(scope="module")
def script() -> ModuleType:
    """The script docs/plan_tables.py as a module."""
    return load_docs_script("plan_tables")


@pytest.fixture(scope="module")
def tables(script: ModuleType) -> dict[str, Any]:
    """The tables by name, for the present config files."""
    return {table.name: table for table in script.make_tables()}


def cells(page: str) -> list[list[str]]:
    """Returns the rows of all tables of a page, without headings, and the compiler versions."""
    lines = page.splitlines()
    separators = [i for i, line in enumerate(lines) if line.startswith("|---")]
    headings = {i - 1 for i in separators}
    rows = [line for i, line in enumerate(lines) if line.startswith("|") and i not in headings]
    versions = re.findall(r"\b(?:JAX|libtpu) [\d.]*\d", page)
    assert rows
    assert versions
    return [[cell.strip() for cell in row.split("|")] for row in rows] + [versions]


def test_rows_match_configs(script: ModuleType, tables: dict[str, Any]) -> None:
    for name, table in tables.items():
        rows = script.read_rows(DOCS / f"{name}.json")
        outdated = [spec.name for spec in table.specs if not spec.is_current(rows)]
        assert not outdated, f"run {script.COMMAND}"
        assert set(rows) == {spec.name for spec in table.specs}


def test_pages_match_rows(script: ModuleType, tables: dict[str, Any]) -> None:
    for name, table in tables.items():
        rows = script.read_rows(DOCS / f"{name}.json")
        page = (DOCS / f"{name}.md").read_text(encoding="utf-8")
        assert cells(table.format_page([rows[spec.name] for spec in table.specs])) == cells(page)


def test_results_use_settings_of_configs(script: ModuleType, tables: dict[str, Any]) -> None:
    rows = script.read_rows(DOCS / "plan_results.json")
    for spec in tables["plan_results"].specs:
        row, configured = rows[spec.name], spec.configured
        assert row["num_steps"] == configured["num_steps"]
        assert row["settings"]["batch_size"] == configured["batch_size"] == 4096
        for setting in ("remat", "num_microbatches", "scan_unroll", "fsdp"):
            assert row["settings"][setting] == configured[setting], "the config does not fit"


def test_row_is_outdated_if_config_changed(script: ModuleType, tables: dict[str, Any]) -> None:
    rows = script.read_rows(DOCS / "plan_results.json")
    spec = tables["plan_results"].specs[0]
    assert spec.is_current(rows)
    assert not spec._replace(configured=spec.configured | {"remat": "full"}).is_current(rows)
    assert not spec._replace(name="mixer_l16_i21k on v9:1x1").is_current(rows)


def test_weak_scaling_sends_the_same_from_each_chip(script: ModuleType) -> None:
    small, large = script.scaling_row("v5e:2x4", 1), script.scaling_row("v5e:16x16", 4)
    assert (small["num_chips"], large["num_chips"]) == (8, 1024)
    assert small["num_bytes"] == large["num_bytes"]
    assert small["arithmetic_seconds"] == pytest.approx(large["arithmetic_seconds"])
    assert large["network_seconds"] > 0


@pytest.mark.slow
def test_script_compiles_nothing_if_rows_are_current(tmp_path: Path) -> None:
    for name in ("plan_results", "weak_scaling"):
        (tmp_path / f"{name}.json").write_bytes((DOCS / f"{name}.json").read_bytes())
    command = [sys.executable, "docs/plan_tables.py", str(tmp_path)]
    env = os.environ | {"PYTHONPATH": str(DOCS.parent)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == [
        *("plan_results.json", "plan_results.md", "weak_scaling.json", "weak_scaling.md")
    ]
    for name in written:
        assert (tmp_path / name).read_bytes() == (DOCS / name).read_bytes()


@pytest.mark.parametrize("text", ["{", json.dumps([1]), json.dumps({"a": 1}), "\x00"])
def test_write_tables_rejects_broken_files(text: str, tmp_path: Path, script: ModuleType) -> None:
    (tmp_path / "weak_scaling.json").write_text(text)
    with raises(UserError, str(tmp_path / "weak_scaling.json")):
        script.write_tables(tmp_path)


def test_write_tables_checks_folder_first(tmp_path: Path, script: ModuleType) -> None:
    (tmp_path / "file").touch()
    with raises(UserError, str(tmp_path / "file" / "weak_scaling.json")):
        script.write_tables(tmp_path / "file")
