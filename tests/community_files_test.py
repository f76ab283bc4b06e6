"""Tests of CITATION.cff, issue forms and workflows, against the schemas of their formats."""

import json
import os
import re
import subprocess
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import mixer_jax

FORMS = sorted(Path(".github/ISSUE_TEMPLATE").glob("*.yml"))
WORKFLOWS = sorted(Path(".github/workflows").glob("*.yml"))
SCHEMAS = {
    Path("CITATION.cff"): "citation-file-format",
    **dict.fromkeys(FORMS, "github-issue-forms"),
    Path(".github/ISSUE_TEMPLATE/config.yml"): "github-issue-config",
    **dict.fromkeys(WORKFLOWS, "github-workflows"),
}


def load_yaml(path: Path) -> Any:
    """Loads YAML 1.2, in which `on` is a string and dates have no type."""
    from ruamel.yaml import YAML

    return json.loads(json.dumps(YAML(typ="safe", pure=True).load(path.read_text())))


def load_schema(name: str) -> Any:
    folder = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    return json.loads((folder / f"{name}.json").read_text())


@pytest.mark.parametrize(("path", "schema"), SCHEMAS.items(), ids=str)
def test_file_follows_the_schema_of_its_format(path: Path, schema: str) -> None:
    validator = jsonschema.validators.validator_for(load_schema(schema))(load_schema(schema))
    content = load_yaml(path)
    assert [error.message for error in validator.iter_errors(content)] == []
    # The schema finds an unknown key.
    assert not validator.is_valid({**content, "unknown_key": {}})


def test_citation_names_the_version_and_the_paper() -> None:
    citation = load_yaml(Path("CITATION.cff"))
    assert citation["version"] == mixer_jax.__version__
    assert citation["license"] == "Apache-2.0"
    paper = citation["preferred-citation"]
    assert len(paper["authors"]) == 12
    assert paper["url"] in Path("README.md").read_text()


def test_bug_form_requires_the_output_of_a_command() -> None:
    fields = {field["id"]: field for field in load_yaml(FORMS[0])["body"] if "id" in field}
    assert FORMS[0].name == "bug.yml"
    assert "`mixer-jax --version`" in fields["versions"]["attributes"]["description"]
    assert fields["versions"]["validations"]["required"]


def run_release_step(name: str, folder: Path, tag: str) -> subprocess.CompletedProcess[str]:
    """Runs a step of the release workflow in a folder, as GitHub's shell does."""
    steps = load_yaml(Path(".github/workflows/release.yml"))["jobs"]["build"]["steps"]
    (script,) = [step["run"] for step in steps if step.get("name", "").startswith(name)]
    return subprocess.run(
        ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script],
        cwd=folder,
        env={**os.environ, "GITHUB_REF_NAME": tag},
        capture_output=True,
        text=True,
        check=False,
    )


def test_release_requires_the_tag_of_the_version(root: Path) -> None:
    version = mixer_jax.__version__
    assert run_release_step("Compare the tag", root, f"v{version}").returncode == 0
    for tag in (version, f"v{version}.1", "v1"):
        done = run_release_step("Compare the tag", root, tag)
        assert done.returncode == 1
        assert f"v{version}, got {tag}" in done.stdout


def test_release_notes_are_the_section_of_the_changelog(tmp_path: Path) -> None:
    changelog = tmp_path / "CHANGELOG.md"
    changelog.write_text(
        "# Changelog\n\n## 0.2.0 (unreleased)\n\n- New.\n\n"
        "## 0.1.0\n\n### Training\n\n- First.\n\n## 0.0.1\n\n- Old.\n"
    )
    assert run_release_step("Find the section", tmp_path, "v0.1.0").returncode == 0
    assert (tmp_path / "notes.md").read_text().split() == ["###", "Training", "-", "First."]
    for tag in ("v0.2.0", "v0.1", "v0.3.0"):
        done = run_release_step("Find the section", tmp_path, tag)
        assert done.returncode == 1
        assert f"## {tag[1:]}" in done.stdout


def test_changelog_has_a_section_for_the_version(root: Path) -> None:
    titles = re.findall(r"^## (\S+)", (root / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert titles[0] == mixer_jax.__version__
