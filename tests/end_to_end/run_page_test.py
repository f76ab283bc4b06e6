"""Tests of the page of a run that is training, was killed, or is finished."""

from pathlib import Path

import pytest

from mixer_jax.visualization.run_page import load_examples, read_runs, render_run_page
from tests.helpers.html_pages import check_stands_alone
from tests.helpers.messages import mentions
from tests.helpers.processes import STEPS, finish, has_reached, kill_at_end, start, wait_until

pytestmark = pytest.mark.slow


def render(workdir: Path) -> str:
    runs = read_runs([str(workdir)])
    return check_stands_alone(render_run_page(runs, load_examples(runs))).text


def test_page_of_a_run_that_trains_is_killed_and_finishes(digits_dir: str, tmp_path: Path) -> None:
    with kill_at_end(start(digits_dir, tmp_path, optimized=True)) as process:
        wait_until(lambda: has_reached(tmp_path, 4), process)
        # Read repeatedly while the run writes its files.
        while not has_reached(tmp_path, 40):
            page = render(tmp_path)
            assert process.poll() is None, process.communicate()
            assert mentions(page, "training", f"of {STEPS}")
        process.kill()
        process.communicate()
    assert mentions(render(tmp_path), "interrupted", f"of {STEPS}")
    finish(start(digits_dir, tmp_path, optimized=True))
    page = render(tmp_path)
    assert mentions(page, "finished", f"{STEPS} of {STEPS}")
    assert "interrupted" not in page
