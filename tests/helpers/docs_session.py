"""Commands and Python of several documentation pages, run in one process.

Each page has its own folder and names. The first item of a page that fails is its last.
"""

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any, NamedTuple

from tests.helpers.cli_session import ROOT, CliResult, run_command


class Item(NamedTuple):
    """Something to run.

    Attributes:
        folder: Working directory, which identifies the page.
        language: "command" for a command `python -m mixer_jax.NAME …`, "shell" or "python".
        content: Arguments of the command, or the code.
        code: Expected exit code.
    """

    folder: str
    language: str
    content: Any
    code: int = 0


def run_items(items: list[Item], data_dir: str) -> list[CliResult | None]:
    """Runs items in order; the result of an item after one that failed is None.

    A warning is an error.

    Args:
        items: Items of all pages.
        data_dir: Directory of TFDS datasets.
    """
    process = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.helpers.docs_session"],
        input=json.dumps(items),
        capture_output=True,
        text=True,
        check=False,
        timeout=900,
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "TFDS_DATA_DIR": data_dir,
            # As for the tests themselves, see tests/conftest.py.
            "JAX_COMPILATION_CACHE_DIR": os.path.expanduser("~/.cache/mixer_jax/tests"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
        },
    )
    assert process.returncode == 0, process.stderr
    return [result and CliResult(*result) for result in json.loads(process.stdout)]


def _run_shell(code: str) -> CliResult:
    # The package is not installed in a checkout, and the Python of a virtual environment that is
    # not activated is not on the path.
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    functions = 'mixer-jax() { python -m mixer_jax "$@"; }\n'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", functions + code],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PATH": path},
    )
    return CliResult(done.returncode, done.stdout, done.stderr)


def _run_python(code: str, names: dict[str, object]) -> CliResult:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        try:
            exec(code, names)
        except Exception:
            return CliResult(1, out.getvalue(), traceback.format_exc())
    return CliResult(0, out.getvalue(), "")


def _main() -> None:
    names: dict[str, dict[str, object]] = {}
    failed: set[str] = set()
    results: list[CliResult | None] = []
    for item in (Item(*fields) for fields in json.load(sys.stdin)):
        result = None
        if item.folder not in failed:
            os.chdir(item.folder)
            if item.language == "command":
                result = run_command(item.content)
            elif item.language == "shell":
                result = _run_shell(item.content)
            else:
                page_names = names.setdefault(item.folder, {"__name__": "documentation"})
                result = _run_python(item.content, page_names)
            if result.code != item.code:
                failed.add(item.folder)
        results.append(result)
    json.dump(results, sys.stdout)


if __name__ == "__main__":
    _main()
