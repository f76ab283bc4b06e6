"""MkDocs hooks: see `docs/site_pages.py`."""

from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

from docs import site_pages


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages for notebooks, and for files outside docs/ that pages link to."""
    pages = {}
    for file in list(files):
        path = f"docs/{file.src_uri}"
        if file.is_documentation_page():
            pages[path] = site_pages.insert_generated(file.content_string)
        elif (page := site_pages.page_of(path)) != path:
            name = page.removeprefix("docs/")
            notebook = f"{name.removesuffix('.md')}.ipynb"
            pages[page] = site_pages.format_notebook(file.content_string, Path(notebook).name)
            files.append(File.generated(config, name, content=pages[page]))
            content = site_pages.convert_notebook(file.content_string)
            files.append(File.generated(config, notebook, content=content))
    for path, content in site_pages.source_pages(pages).items():
        name = path.removeprefix("docs/")
        # These pages are reached by links only.
        inclusion = InclusionLevel.NOT_IN_NAV
        files.append(File.generated(config, name, content=content, inclusion=inclusion))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Inserts generated text, and rewrites links to files that are not pages."""
    del config, files
    path = f"docs/{page.file.src_uri}"
    return site_pages.rewrite_links(site_pages.insert_generated(markdown), path)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Keeps flags in code on one line."""
    del page, config, files
    return site_pages.keep_flags_together(html)
