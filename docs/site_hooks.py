"""MkDocs hooks: generated pages, and links to files of the repository outside docs/.

- `<!-- generated: NAME -->…<!-- end -->` in a page is replaced by the text that `GENERATED`
  computes. What is between the markers is shown where the page is read without the site.
- A link to a file outside docs/ leads to a page with its content, which `on_files` adds.
- Notebooks, which are Python files in percent format, become pages.
"""

import posixpath
import re
from collections.abc import Callable
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from docs.generated_reference import format_commands, format_config_keys

ROOT = Path(__file__).parent.parent
# Folder of the pages with the content of other files.
SOURCES = "source"
# Files outside docs/ that are part of a page of the site.
_PAGES = {"CHANGELOG.md": "changelog.md", "README.md": "index.md"}
_GENERATED = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end -->", re.DOTALL)
_LINK = re.compile(r"(?<=\]\()(?!\w+:|#|/)([^)\s#]+)")
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}


def _read_changelog() -> str:
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    return _rewrite_links(text, "CHANGELOG.md", "docs/changelog.md")


GENERATED: dict[str, Callable[[], str]] = {
    "changelog": _read_changelog,
    "commands": format_commands,
    "config_keys": format_config_keys,
}


def _site_path(path: str) -> str:
    """Returns the path, from the root of the repository, of the site's page for a file."""
    if path.startswith("docs/") or not (ROOT / path).is_file():
        return path
    if path in _PAGES:
        return f"docs/{_PAGES[path]}"
    suffix = "" if path.endswith(".md") else ".md"
    return f"docs/{SOURCES}/{path}{suffix}"


def _resolve(link: str, source: str) -> str:
    """Returns the path from the root of the repository that a link in a file leads to."""
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), link))


def _rewrite_links(markdown: str, source: str, page: str) -> str:
    """Rewrites the links of a file of the repository for the page that shows it."""

    def rewrite(match: re.Match[str]) -> str:
        target = _resolve(match[1], source)
        if target.startswith("docs/notebooks/") and target.endswith(".py"):
            target = f"{target.removesuffix('.py')}.md"
        return posixpath.relpath(_site_path(target), posixpath.dirname(page))

    return _LINK.sub(rewrite, markdown)


def _linked_files(markdown: str, source: str) -> set[str]:
    """Lists the files outside docs/ that a page shows by links, and those linked from them."""
    found: set[str] = set()
    pending = [(markdown, source)]
    while pending:
        text, path = pending.pop()
        for link in _LINK.findall(text):
            target = _resolve(link, path)
            if target in found or not _site_path(target).startswith(f"docs/{SOURCES}/"):
                continue
            found.add(target)
            if target.endswith(".md"):
                pending.append(((ROOT / target).read_text(encoding="utf-8"), target))
    return found


def _format_source(path: str) -> str:
    """Formats the page of a file outside docs/."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.endswith(".md"):
        return _rewrite_links(text, path, _site_path(path))
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"# {path}\n\n````{language}\n{text}````\n"


def format_notebook(text: str) -> str:
    """Formats a Python file in percent format as Markdown."""
    _, *cells = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    page = ""
    for header, cell in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in header:
            page += re.sub("^# ?", "", cell.strip("\n"), flags=re.MULTILINE) + "\n\n"
        elif cell.strip():
            page += f"```python\n{cell.strip()}\n```\n\n"
    return page


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages for notebooks and for linked files outside docs/."""
    markdown = {f"docs/{file.src_uri}": file.content_string for file in files.documentation_pages()}
    for file in list(files):
        if file.src_uri.startswith("notebooks/") and file.src_uri.endswith(".py"):
            page = format_notebook(file.content_string)
            markdown[f"docs/{file.src_uri}"] = page
            name = f"{file.src_uri.removesuffix('.py')}.md"
            files.append(File.generated(config, name, content=page))
    markdown["CHANGELOG.md"] = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    linked = set().union(*(_linked_files(text, path) for path, text in markdown.items()))
    for path in sorted(linked):
        name = _site_path(path).removeprefix("docs/")
        # These pages are reached by links only.
        page = f"---\nsearch:\n  exclude: true\n---\n\n{_format_source(path)}"
        level = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, content=page, inclusion=level))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Inserts generated text, and rewrites links to files outside docs/."""
    if page.file.src_uri.startswith(f"{SOURCES}/"):
        return markdown
    source = f"docs/{page.file.src_uri}"
    markdown = _rewrite_links(markdown, source, source)
    return _GENERATED.sub(lambda match: GENERATED[match[1]](), markdown)
