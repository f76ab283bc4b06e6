"""Pages of the documentation site that are not written in docs/, and links to other files.

- `<!-- generated: NAME -->…<!-- end -->` in a page is replaced by the text that `GENERATED`
  computes. What is between the markers is shown where the page is read without the site.
- A link to a file outside docs/ leads to a page with the content of that file.
- Notebooks are Python files in percent format; a link to one leads to its page.

`docs/site_hooks.py` uses these functions when the site is built.
"""

import posixpath
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from docs.generated_reference import format_commands, format_config_keys, format_configs

ROOT = Path(__file__).parent.parent
# Folder of the pages with the content of files outside docs/.
SOURCES = "docs/source"
_NOTEBOOKS = "docs/notebooks"
# Files outside docs/ that are already part of the site.
_PAGES = {"CHANGELOG.md": "docs/changelog.md", "README.md": "docs/index.md"}
_LANGUAGES = {".py": "python", ".sh": "bash", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml"}
_GENERATED = re.compile(r"<!-- generated: (\w+) -->.*?<!-- end -->", re.DOTALL)
# Blocks of code, and targets of relative links, without anchor.
_CODE_OR_LINK = re.compile(
    r"(?P<code>^(?P<fence>```+).*?^(?P=fence)$|`[^`\n]+`)|(?<=\]\()(?P<link>(?!\w+:|#|/)[^)\s#]+)",
    re.DOTALL | re.MULTILINE,
)


def find_links(markdown: str, path: str) -> list[str]:
    """Lists the files that a page links to.

    Args:
        markdown: Content of the page.
        path: Path of the page. Paths are relative to the root of the repository.
    """
    matches = _CODE_OR_LINK.finditer(markdown)
    return [_resolve(match["link"], path) for match in matches if match["link"]]


def rewrite_links(markdown: str, path: str, page: str = "") -> str:
    """Rewrites links to files that are not pages, so that they lead to pages.

    Args:
        markdown: Content of a file.
        path: Path of the file.
        page: Path of the page that shows the file, if it is another one.
    """

    def rewrite(match: re.Match[str]) -> str:
        if match["code"]:
            return match[0]
        target = page_of(_resolve(match["link"], path))
        return posixpath.relpath(target, posixpath.dirname(page or path))

    return _CODE_OR_LINK.sub(rewrite, markdown)


def _resolve(link: str, path: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def page_of(path: str) -> str:
    """Returns the path of the page that shows a file; the same path if it is not shown by another.

    Folders and missing files stay as they are, so that MkDocs reports links to them.
    """
    if path.startswith(f"{_NOTEBOOKS}/") and path.endswith(".py"):
        return f"{path.removesuffix('.py')}.md"
    if path.startswith("docs/") or not (ROOT / path).is_file():
        return path
    return _PAGES.get(path, f"{SOURCES}/{path}" + ("" if path.endswith(".md") else ".md"))


def insert_generated(markdown: str) -> str:
    """Replaces the markers in a page by generated text."""
    return _GENERATED.sub(lambda match: GENERATED[match[1]](), markdown)


def _format_changelog() -> str:
    path = "CHANGELOG.md"
    return rewrite_links(_read(path), path, _PAGES[path])


GENERATED: Mapping[str, Callable[[], str]] = {
    "changelog": _format_changelog,
    "commands": format_commands,
    "config_keys": format_config_keys,
    "configs": format_configs,
}


def keep_flags_together(html: str) -> str:
    """Marks the beginning of flags in code, where browsers would break lines after the hyphens."""
    return re.sub(
        r"<code[ >].*?</code>",
        lambda match: re.sub(r"(?<![\w\"-])--\w", r'<span class="flag">\g<0></span>', match[0]),
        html,
        flags=re.DOTALL,
    )


def source_pages(pages: Mapping[str, str]) -> dict[str, str]:
    """Formats pages for files outside docs/ that pages link to, or that these files link to.

    Args:
        pages: Content of each page by its path.

    Returns:
        Content of the additional pages by their paths.
    """
    found: dict[str, str] = {}
    pending = list(pages.items())
    while pending:
        path, markdown = pending.pop()
        for target in find_links(markdown, path):
            page = page_of(target)
            if page.startswith(f"{SOURCES}/") and page not in found:
                found[page] = _format_source(target)
                if target.endswith(".md"):
                    pending.append((target, _read(target)))
    return found


def _format_source(path: str) -> str:
    # The search finds only pages of the documentation. Code is wide.
    header = "---\nhide: [navigation, toc]\nsearch:\n  exclude: true\n---\n\n"
    if path.endswith(".md"):
        return header + rewrite_links(_read(path), path, page_of(path))
    language = _LANGUAGES.get(Path(path).suffix, "text")
    return f"{header}# {path}\n\n````{language}\n{_read(path)}````\n"


def _read(path: str) -> str:
    return (ROOT / path).read_text(encoding="utf-8")


def convert_notebook(text: str) -> str:
    """Converts a Python file in percent format to a Jupyter notebook, without outputs."""
    # Also used without the packages of the site.
    import jupytext

    notebook = jupytext.reads(text, fmt="py:percent")
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    for number, cell in enumerate(notebook.cells):
        # Random ones would differ in every build.
        cell["id"] = f"cell-{number}"
        if cell["cell_type"] == "markdown":
            # Relative links lead nowhere from where a notebook is downloaded to.
            cell["source"] = re.sub(r"\[([^]]+)\]\((?!\w+:)[^)]+\)", r"\1", cell["source"])
    converted: str = jupytext.writes(notebook, fmt="ipynb")
    return converted


def format_notebook(text: str, download: str = "") -> str:
    """Formats a Python file in percent format as Markdown.

    Args:
        text: Content of the file.
        download: Name of the Jupyter notebook that the page links to; empty: no link.
    """
    _, *cells = re.split(r"^# %%(.*)\n", text, flags=re.MULTILINE)
    page = ""
    for header, cell in zip(cells[::2], cells[1::2], strict=True):
        if "[markdown]" in header:
            page += re.sub("^# ?", "", cell.strip("\n"), flags=re.MULTILINE) + "\n\n"
        elif code := re.sub("^# !", "!", cell.strip(), flags=re.MULTILINE):
            page += f"```python\n{code}\n```\n\n"
    if download:
        # Below the title.
        title, _, rest = page.partition("\n")
        page = f"{title}\n\n[Download this notebook]({download}){{ download }}\n{rest}"
    return page
