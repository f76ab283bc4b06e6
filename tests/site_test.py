"""Tests of the documentation site: generated pages, and links of all Markdown files."""

import importlib
import re
from pathlib import Path

import pytest

from docs import generated_reference, site_pages
from mixer_jax.__main__ import COMMANDS
from mixer_jax.benchmark import MODES
from mixer_jax.config.schema import EVAL_FIELDS, FIELDS, MIXTURE_FIELDS, Field

ENTRY = re.compile(
    r"^#### `([^\n]+)` \{ #(\S+) \.entry \}\n\n(.*?)(?=^#|\Z)", re.MULTILINE | re.DOTALL
)
# Files that are shown on their own, and not only on the site.
TEXTS = ("*.md", "launch/**/*.md", "docs/**/*.md", ".github/**/*.md")


@pytest.fixture(scope="module")
def commands() -> str:
    """Generated text of the page of commands."""
    return generated_reference.format_commands()


def test_every_config_key_is_described_once() -> None:
    entries = ENTRY.findall(generated_reference.format_config_keys())
    fields = FIELDS | {f"evals.NAME.{key}": field for key, field in EVAL_FIELDS.items()}
    fields |= {f"mixture.NAME.{key}": field for key, field in MIXTURE_FIELDS.items()}
    assert sorted(name for name, _, _ in entries) == sorted(fields)
    anchors = {name: anchor for name, anchor, _ in entries}
    assert len(set(anchors.values())) == len(fields)
    assert anchors["optimizer.learning_rate"] == "optimizer-learning_rate"
    assert anchors["evals.NAME.split"] == "evals-name-split"
    for name, _, text in entries:
        field = fields[name]
        default = str(field.default).lower() if field.type is bool else str(field.default) or '""'
        assert f"default `{default}`" in text, name
        if len(field.choices) > 1:
            assert all(f"`{choice}`" in text for choice in field.choices if choice), name
        assert ("resumed" in text) == field.resumable, name


def test_ranges_units_and_example_of_a_config_key() -> None:
    fields = {
        "size": Field(int, 4, "side of a patch", unit="px", min=1),
        "rate": Field(float, 0.5, "rate", min=0, max=0.9, resumable=True),
        "freeze": Field(str, "", "layers", example="stem,*bias"),
    }
    size, rate, freeze = ENTRY.findall(generated_reference._format_fields(fields))
    assert "Integer in pixels; default `4`; at least 1." in size[2]
    assert "Side of a patch." in size[2]
    assert "Number; default `0.5`; from 0 to 0.9; may change" in rate[2]
    # Shells expand an asterisk.
    assert "Layers. Example: `--config.freeze='stem,*bias'`." in freeze[2]


def test_every_installed_config_is_listed_with_its_purpose(root: Path) -> None:
    rows = re.findall(
        r"^\| \[`(\w+)`\]\((\S+)\) \| (.+) \|$", generated_reference.format_configs(), re.M
    )
    files = sorted((root / "configs").glob("*.py"))
    assert [name for name, _, _ in rows] == [file.stem for file in files]
    for (_, link, purpose), file in zip(rows, files, strict=True):
        assert (root / "docs" / "reference" / link).resolve() == file
        assert file.read_text(encoding="utf-8").lstrip("r").startswith(f'"""{purpose}\n')
    page = site_pages.insert_generated((root / "docs/reference/config.md").read_text())
    assert {link for _, link, _ in rows} <= set(re.findall(r"\]\((\S+)\)", page))


def cells_of(path: Path) -> dict[str, list[str]]:
    """Returns the cells of table rows that start with a file of configs/, by this file."""
    rows = re.findall(r"^\| \[?`(configs/\w+\.py)`(.*) \|$", path.read_text(), re.MULTILINE)
    return {config: cells.split(" | ")[1:] for config, cells in rows}


def test_results_of_the_readme_and_of_the_home_page_agree(root: Path) -> None:
    readme, home = cells_of(root / "README.md"), cells_of(root / "docs/index.md")
    assert readme.keys() == home.keys()
    assert len(home) >= 7
    for config, (result, *conditions) in readme.items():
        _, top1, *others = home[config]
        assert result.startswith(top1), config
        assert conditions == others, config


def sections_of(page: str) -> dict[str, str]:
    """Splits the page of commands at its headings of commands and of modes."""
    parts = re.split(r"^###? (.+) \{ #\S+ \}$", page, flags=re.MULTILINE)[1:]
    return dict(zip(parts[::2], parts[1::2], strict=True))


def printed_flags(module: str, argv: list[str], capsys: pytest.CaptureFixture[str]) -> set[str]:
    """Returns the flags that the help of a command lists."""
    with pytest.raises(SystemExit) as stopped:
        importlib.import_module(f"mixer_jax.{module}").main([*argv, "--help"])
    assert not stopped.value.code
    text = capsys.readouterr().out
    return set(re.findall(r"^  (?:-\w, )?(--[\w.]+)", text, re.MULTILINE)) - {"--help"}


def test_every_argument_of_every_command_is_described(
    commands: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sections = sections_of(commands)
    assert {name for name, _, _ in COMMANDS} <= sections.keys()
    runs: dict[str, tuple[str, list[str]]] = {
        name: (module, []) for name, module, _ in COMMANDS if module != "benchmark"
    }
    for title in sections:
        command, *rest = title.split()
        if rest and command in ("benchmark", "visualize"):
            runs[title] = (command, rest)
    assert {"visualize data", "visualize units", "visualize saliency"} <= runs.keys()
    modes = ",".join(argv[0] for _, argv in runs.values() if argv[:1] and "--mode=" in argv[0])
    assert set(modes.replace("--mode=", "").split(",")) == set(MODES)
    for title, (module, argv) in runs.items():
        described = {name.partition("=")[0] for name, _, _ in ENTRY.findall(sections[title])}
        assert {name for name in described if name.startswith("--")} == printed_flags(
            module, argv, capsys
        ), title
    anchors = [anchor for _, anchor, _ in ENTRY.findall(commands)]
    assert len(set(anchors)) == len(anchors)
    assert {"predict-topk", "predict-image", "train-config", "plan-topology"} <= {*anchors}


def test_help_becomes_a_sentence_without_changing_identifiers() -> None:
    sentence = generated_reference._sentence
    assert sentence("side of a patch, e.g. 16") == "Side of a patch, e.g. 16."
    assert sentence("default: test") == "Default: test."
    assert sentence("native: that of the checkpoint") == "native: that of the checkpoint."
    assert sentence("few_shot: images") == "few_shot: images."
    assert sentence("muon, adafactor: decay") == "muon, adafactor: decay."
    assert sentence("inception, resize", ("inception", "resize")) == "inception, resize."
    assert sentence("as --config.seed=1, e.g. <N>") == r"As `--config.seed=1`, e.g. \<N>."


def test_notebook_becomes_markdown_with_code_blocks() -> None:
    notebook = "# ---\n# jupyter: {}\n# ---\n\n# %% [markdown]\n# # Title\n#\n# Text.\n\n"
    notebook += "# %%\nx = 1\n\n# %%\n# A comment.\nprint(x)\n"
    assert site_pages.format_notebook(notebook) == (
        "# Title\n\nText.\n\n```python\nx = 1\n```\n\n```python\n# A comment.\nprint(x)\n```\n\n"
    )


def test_notebook_page_shows_commands_and_links_to_the_notebook() -> None:
    notebook = "# %% [markdown]\n# # Title\n#\n# Text.\n\n# %%\n# !mixer-jax predict\n"
    assert site_pages.format_notebook(notebook, "x.ipynb") == (
        "# Title\n\n[Download this notebook](x.ipynb){ download }\n\nText.\n\n"
        "```python\n!mixer-jax predict\n```\n\n"
    )


def test_links_to_other_files_lead_to_pages_that_show_them() -> None:
    markdown = (
        "[a](../../configs/digits.py) [b](../index.md#results) [c](https://example.org/x.md)\n"
        "[d](../../CHANGELOG.md#data) [e](../missing.py) `[f](../../README.md)`\n"
        "```\n[g](../../README.md)\n```\n[h](../notebooks/first_steps.py)\n"
    )
    path = "docs/how_to/data.md"
    assert site_pages.rewrite_links(markdown, path) == (
        "[a](../source/configs/digits.py.md) [b](../index.md#results) [c](https://example.org/x.md)\n"
        "[d](../changelog.md#data) [e](../missing.py) `[f](../../README.md)`\n"
        "```\n[g](../../README.md)\n```\n[h](../notebooks/first_steps.md)\n"
    )
    pages = site_pages.source_pages({path: "[a](../../CONTRIBUTING.md)"})
    assert pages.keys() >= {"docs/source/CONTRIBUTING.md"}
    assert all(page.startswith("docs/source/") for page in pages)


def test_flags_are_marked_in_code_only() -> None:
    html = '<p title="--a">--b</p><code>x --cd=-1 --e</code><code class="--f">a--g</code>'
    assert site_pages.keep_flags_together(html) == (
        '<p title="--a">--b</p><code>x <span class="flag">--c</span>d=-1 '
        '<span class="flag">--e</span></code><code class="--f">a--g</code>'
    )


def anchors_of(path: Path, root: Path) -> set[str]:
    """Returns the anchors of a Markdown file, with those of its generated parts."""
    text = site_pages.insert_generated(path.read_text())
    text = re.sub(r"^(`{3,}).*?^\1$", "", text, flags=re.MULTILINE | re.DOTALL)
    found = set(re.findall(r"\{ #(\S+)", text)) | set(re.findall(r"^::: (\S+)", text, re.MULTILINE))
    for heading in re.findall(r"^#+ (.+)$", text, re.MULTILINE):
        words = re.sub(r"[^\w\s-]", "", heading.lower()).strip()
        found.add(re.sub(r"\s", "-", words))
        # MkDocs combines repeated hyphens, GitHub does not.
        found.add(re.sub(r"[-\s]+", "-", words))
    return found


def test_files_and_sections_that_links_name_exist(root: Path) -> None:
    files = sorted({path for pattern in TEXTS for path in root.glob(pattern)})
    assert {"README.md", "CONTRIBUTING.md", "docs/index.md", "launch/README.md"} <= {
        str(path.relative_to(root)) for path in files
    }
    broken = []
    num_links = 0
    for path in files:
        text = re.sub(r"^(`{3,}).*?^\1$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
        for link in re.findall(r"\]\((?!\w+:)([^)\s]+)", re.sub(r"`[^`\n]+`", "", text)):
            num_links += 1
            name, _, anchor = link.partition("#")
            target = (path.parent / name).resolve() if name else path
            is_missing = not target.exists() or not target.is_relative_to(root)
            if is_missing or (anchor and anchor not in anchors_of(target, root)):
                broken.append(f"{path.relative_to(root)}: {link}")
    assert num_links > 20
    assert broken == []
