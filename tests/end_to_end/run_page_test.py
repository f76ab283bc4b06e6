"""Tests of the page of a run that is training, was killed, or is finished."""

from pathlib import Path
from typing import Any

import pytest

from mixer_jax.training.workdir import read_starts
from mixer_jax.visualization.run_page import load_examples, read_runs, render_run_page
from tests.helpers.html_pages import check_stands_alone
from tests.helpers.processes import finish, has_reached, kill_at_end, start, wait_until

pytestmark = pytest.mark.slow

# Many more than a fast machine takes while a page is rendered.
STEPS = 400
CHANGES: dict[str, Any] = {
    "num_steps": STEPS,
    "checkpoint__every_steps": 20,
    "evals__test__every_steps": 200,
}


def read_state(workdir: Path) -> str:
    """Renders the page of a run, and returns the state that it shows."""
    runs = read_runs([str(workdir)])
    page = check_stands_alone(render_run_page(runs, load_examples(runs)))
    assert f"{runs[0].step} of {STEPS}" in page.text
    assert f"state{runs[0].state}" in page.text.replace("\n", "")
    return runs[0].state


def test_page_of_a_run_that_trains_is_killed_and_finishes(digits_dir: str, tmp_path: Path) -> None:
    with kill_at_end(start(digits_dir, tmp_path, optimized=True, **CHANGES)) as process:
        wait_until(lambda: has_reached(tmp_path, 4), process, seconds=300)
        # Read repeatedly while the run writes its files.
        while not has_reached(tmp_path, 40):
            assert read_state(tmp_path) == "training"
            assert process.poll() is None, process.communicate()
        process.kill()
        process.communicate()
    assert read_state(tmp_path) == "interrupted"
    finish(start(digits_dir, tmp_path, optimized=True, **CHANGES))
    assert read_state(tmp_path) == "finished"
    first, second = (line["step"] for line in read_starts(str(tmp_path)))
    assert first == 0 < second < STEPS
