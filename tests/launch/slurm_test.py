"""Tests of launch/slurm.sbatch with a fake SLURM."""

import os
import subprocess
from pathlib import Path

from tests.helpers import launch_scripts
from tests.helpers.messages import mentions


def run_job(
    folder: Path, code: int, *arguments: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Runs the batch script; returns its result and the commands it passes to SLURM.

    Args:
        folder: Temporary folder.
        code: Exit code of srun.
        *arguments: Arguments of the script.
    """
    calls = folder / "calls"
    calls.write_text("")
    bin_dir = folder / "bin"
    launch_scripts.write_program(bin_dir / "srun", f'echo "srun $*" >>{calls}; exit {code}')
    launch_scripts.write_program(bin_dir / "scontrol", f'echo "scontrol $*" >>{calls}')
    env = {
        "SLURM_SUBMIT_DIR": str(Path.cwd()),
        "SLURM_JOB_ID": "7",
        "PATH": f"{bin_dir}:{os.environ['PATH']}",
    }
    result = launch_scripts.run("slurm.sbatch", *arguments, **env)
    return result, calls.read_text().splitlines()


def test_job_is_requeued_only_after_sigterm(tmp_path: Path) -> None:
    for code, expected in ((0, 0), (143, 0), (1, 1), (2, 2), (134, 134), (139, 139)):
        result, calls = run_job(tmp_path, code, "--config=x")
        assert result.returncode == expected
        srun, *others = calls
        assert srun.startswith("srun ")
        assert srun.endswith(" .venv/bin/python -u -m mixer_jax.main --config=x")
        # srun must not kill the processes that are still saving.
        assert "--kill-on-bad-exit=0" in srun
        assert others == (["scontrol requeue 7"] if code == 143 else [])


def test_job_without_arguments_is_rejected(tmp_path: Path) -> None:
    result, calls = run_job(tmp_path, 0)
    launch_scripts.assert_usage_error(result, "--config")
    assert calls == []


def test_script_outside_of_slurm_is_rejected() -> None:
    result = launch_scripts.run("slurm.sbatch", "--config=x")
    assert result.returncode != 0
    assert mentions(result.stderr, "sbatch")


def test_job_gets_sigterm_before_its_time_limit() -> None:
    lines = Path("launch/slurm.sbatch").read_text().splitlines()
    options = [line.removeprefix("#SBATCH ") for line in lines if line.startswith("#SBATCH ")]
    # To the training processes, not to the batch script (B:), which has nothing to save.
    assert "--signal=TERM@120" in options
    assert "--requeue" in options
    # sbatch ignores options after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert not any(line.startswith("#SBATCH") for line in lines[first:])
