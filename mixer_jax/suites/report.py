"""What a suite ends with: the table on the terminal, and as CSV, JSON, Markdown and a picture."""

import json

from etils import epath

from mixer_jax.errors import UserError, summarize_error
from mixer_jax.files import atomic_write
from mixer_jax.suites import table as tables
from mixer_jax.suites.picture import plot_table
from mixer_jax.suites.plan import SUITE_FILE, read_plan
from mixer_jax.suites.throughput import Throughput

THROUGHPUT_FILE = "throughput.json"
_PICTURE = "results.png"
_FORMS = {
    "results.txt": tables.as_text,
    "results.csv": tables.as_csv,
    "results.json": tables.as_json,
    "results.md": tables.as_markdown,
}


def report(workdir: str) -> None:
    """Prints a suite's table as it stands, and writes it in every form beside its results.

    Args:
        workdir: absolute path or URL of the suite.

    Raises:
        UserError: there is no suite in it, a file of it is damaged, or none can be written.
    """
    plan = read_plan(workdir)
    if plan is None:
        raise UserError(f"--workdir={workdir} holds no suite: there is no {SUITE_FILE} in it")
    table = tables.make_table(plan, workdir, read_throughput(workdir))
    # First of all: it is there to be seen whatever becomes of the files.
    print(f"\n{tables.as_text(table)}", flush=True)
    try:
        for name, form in _FORMS.items():
            atomic_write(epath.Path(workdir) / name, form(table))
        # Of nothing there is no picture.
        if picture := plot_table(table):
            atomic_write(epath.Path(workdir) / _PICTURE, picture)
    except OSError as error:
        raise UserError(
            f"--workdir={workdir}: the table cannot be written "
            f"({error.strerror or summarize_error(error)}); mend that, and --report writes it"
        ) from error
    print(f"\nalso as {workdir}/results.{{csv,json,md,png}}", flush=True)


def save_throughput(workdir: str, measured: Throughput) -> None:
    """Writes what `cost.measure_throughput` found."""
    text = json.dumps(measured._asdict(), indent=2) + "\n"
    atomic_write(epath.Path(workdir) / THROUGHPUT_FILE, text)


def read_throughput(workdir: str) -> Throughput | None:
    """Returns what `save_throughput` wrote; None: nothing yet.

    Raises:
        UserError: the file is damaged.
    """
    path = epath.Path(workdir) / THROUGHPUT_FILE
    if not path.exists():
        return None
    try:
        measured = Throughput(**json.loads(path.read_text()))
        height, width = measured.image_size
        return measured._replace(image_size=(height, width))
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} is damaged; remove it to measure again") from error
