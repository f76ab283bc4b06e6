"""Tests of docs/notebooks: both run without warnings and show their pictures."""

import os
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from docs.site_pages import convert_notebook

NOTEBOOKS = sorted((Path(__file__).parent.parent / "docs" / "notebooks").glob("*.py"))
# Executed first. The kernel's own code warns about its methods.
SETUP = "import warnings\nwarnings.simplefilter('error')\n"
SETUP += "warnings.filterwarnings('ignore', module='ipykernel')"


def outputs_of(notebook: Any, kind: str) -> list[Any]:
    """Lists the outputs of a kind, such as "stream", of all cells."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [out for cell in cells for out in cell.outputs if out.output_type == kind]


@pytest.fixture
def kernel_env(monkeypatch: pytest.MonkeyPatch, root: Path, tmp_path: Path) -> None:
    """Environment of the kernel: this checkout and this Python, on CPU."""
    monkeypatch.setenv("PYTHONPATH", str(root))
    folders = [str(Path(sys.executable).parent), os.environ["PATH"]]
    monkeypatch.setenv("PATH", os.pathsep.join(folders))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    for name in ("IPYTHONDIR", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    # TFDS prepares digits here.
    monkeypatch.setenv("TFDS_DATA_DIR", str(tmp_path / "tfds"))


@pytest.mark.slow
@pytest.mark.usefixtures("kernel_env")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_without_warnings_and_shows_pictures(path: Path, tmp_path: Path) -> None:
    folder = tmp_path / "workspace"
    folder.mkdir()
    notebook = nbformat.reads(convert_notebook(path.read_text()), as_version=4)
    nbformat.validate(notebook)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SETUP))
    client = NotebookClient(notebook, timeout=600, resources={"metadata": {"path": str(folder)}})
    client.execute()
    if save_to := os.environ.get("MIXER_JAX_SAVE_NOTEBOOKS"):
        nbformat.write(notebook, Path(save_to) / f"{path.stem}.ipynb")

    streams = outputs_of(notebook, "stream")
    messages = "".join(out.text for out in streams if out.name == "stderr").splitlines()
    # The data set is prepared in the first notebook.
    assert [line for line in messages if not line.startswith("writing dataset digits")] == []
    text = "".join(out.text for out in streams)
    # Nothing but sentences and tables: no logs with time stamps, no progress bars.
    assert "\r" not in text
    assert "\x1b" not in text
    pictures = [out for out in outputs_of(notebook, "display_data") if "image/png" in out.data]
    results = outputs_of(notebook, "execute_result")
    pictures += [out for out in results if "image/png" in out.data]
    assert len(pictures) >= (4 if path.stem == "first_steps" else 3)
    without = [out for out in results if "image/png" not in out.data]
    assert not any("Figure" in out.data["text/plain"] for out in without)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_converted_notebook_has_the_cells_of_the_script(path: Path) -> None:
    text = path.read_text()
    notebook = nbformat.reads(convert_notebook(text), as_version=4)
    nbformat.validate(notebook)
    assert len(notebook.cells) == text.count("\n# %%") + text.startswith("# %%")
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.metadata.kernelspec.name == "python3"
    # Links lead to the site from wherever the notebook was downloaded to.
    assert ".py)" not in "".join(cell.source for cell in notebook.cells)
