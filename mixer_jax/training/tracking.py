"""Logs a run to Weights & Biases, without training ever waiting for it."""

import functools
import importlib.util
import os
import queue
import sys
import threading
import uuid
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, NamedTuple

from etils import epath
from tqdm import tqdm

from mixer_jax.errors import UserError, exit_code, missing_library_error, summarize_error
from mixer_jax.files import atomic_write

RUN_ID_FILE = "wandb_run_id.txt"
# Seconds to reach the server before the run is recorded offline, and to upload what is left at the
# end. W&B's own are 90 and unlimited.
_INIT_TIMEOUT, _FINISH_TIMEOUT = 30.0, 30.0
# Seconds to wait for the upload after a failure of the run, which other hosts are waiting for.
_FAILURE_TIMEOUT = 5.0
# Metrics are plotted over this key. W&B's own step only increases, so that it would drop the steps
# that a resumed run repeats.
_STEP = "step"
# Ids of the runs that this process has started.
_used_ids: set[str] = set()


def check_wandb_installed(project: str) -> None:
    """Raises UserError if a run is to be logged to W&B and its library is not installed."""
    # A folder named wandb in the working directory, where W&B stores runs by default, is a
    # namespace package, which has no origin.
    spec = importlib.util.find_spec("wandb") if project else None
    if project and (spec is None or spec.origin is None):
        raise missing_library_error(f"config.wandb={project}", "the library wandb", "wandb")


class RunLabel(NamedTuple):
    """Name of a run among those of a suite, and the group of W&B that they form."""

    name: str
    group: str


class WandbRun:
    """Run of Weights & Biases, which a background thread starts, writes and finishes.

    A context manager, which finishes the run with the exit code of the process. A run that resumes
    in the same workdir continues the same run of W&B. If the server cannot be reached, or there is
    no account, the run is recorded in the workdir, to be uploaded later. Any other error is printed
    and ends logging to W&B; training continues. Other runs of W&B in this process are unaffected.

    Attributes:
        exit_code: Exit code of the process, if no exception ends it.
        is_preempted: Whether the machine is taken away, so that the run will be resumed.
    """

    def __init__(
        self,
        project: str,
        workdir: str,
        config: Mapping[str, Any],
        label: RunLabel | None = None,
    ):
        """Starts the run in the background.

        Args:
            project: Project of W&B; empty: nothing is logged.
            workdir: Absolute path or URL of the run, in which its id is stored.
            config: Config of the run, as nested dicts.
            label: Name and group of a run of a suite; others are named after their workdirs.
        """
        self.exit_code, self.is_preempted = 0, False
        self._label = label
        self._project, self._workdir, self._config = project, workdir, config
        self._calls = queue.SimpleQueue[Callable[[Any], object] | None]()
        self._is_enabled = bool(project)
        # A daemon does not keep the process from ending.
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if not self._is_enabled:
            return
        try:
            # Not in the background, where it could meet other imports halfway. Takes about 1.5 s.
            importlib.import_module("wandb")
        except Exception as error:
            self._disable(error)
        else:
            self._submit(_define_metrics)
            self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Logs the values of one step."""
        self._submit(lambda run: run.log({_STEP: step, **values}))

    def log_image(self, step: int, name: str, path: str) -> None:
        """Logs an image file, local or at a URL."""

        def log_image(run: Any) -> None:
            import wandb
            from PIL import Image

            with epath.Path(path).open("rb") as file:
                run.log({_STEP: step, name: wandb.Image(Image.open(file))})

        self._submit(log_image)

    def __enter__(self) -> "WandbRun":
        return self

    def __exit__(
        self,
        _type: type[BaseException] | None,
        error: BaseException | None,
        _traceback: TracebackType | None,
    ) -> None:
        if not self._thread.is_alive():
            return
        if error is not None:
            self.exit_code = exit_code(error)
        if self.is_preempted:
            self._submit(lambda run: run.mark_preempting())
        self._calls.put(None)
        is_failed = error is not None and not isinstance(error, UserError)
        self._thread.join(_FAILURE_TIMEOUT if is_failed else _INIT_TIMEOUT + _FINISH_TIMEOUT)

    def _submit(self, call: Callable[[Any], object]) -> None:
        if self._is_enabled:
            self._calls.put(call)

    def _work(self) -> None:
        try:
            run = self._start()
        except Exception as error:
            self._disable(error)
            return
        # Runs to the end of training also after an error: only then the exit code is known.
        while call := self._calls.get():
            if self._is_enabled:
                self._try(call, run)
        self._try(functools.partial(_finish, code=self.exit_code), run)

    def _try(self, call: Callable[[Any], object], run: Any) -> None:
        try:
            call(run)
        except Exception as error:
            self._disable(error)

    def _disable(self, error: Exception) -> None:
        # Not worth ending a run for: metrics.jsonl has the same values.
        self._is_enabled = False
        _print(f"Weights & Biases is disabled: {summarize_error(error)}.")

    def _start(self) -> Any:
        """Starts the run, offline if the server cannot be reached or there is no account."""
        import wandb

        # W&B would otherwise ask for an account on a terminal, and wait.
        silent = wandb.Settings(silent=True)
        settings: dict[str, Any] = {
            "silent": True,
            # The caller of `mixer_jax.train` may have a run of its own.
            "reinit": "create_new",
            # Leaves the standard streams alone, which have the same numbers.
            "console": "off",
            "init_timeout": _INIT_TIMEOUT,
            "finish_timeout": _FINISH_TIMEOUT,
            "finish_timeout_raises": True,
        }
        run_id, is_new = self._read_or_create_id()
        is_local = "://" not in self._workdir
        arguments: dict[str, Any] = {
            "project": self._project,
            "id": run_id,
            "resume": "allow",
            # Only once, since users rename and regroup runs.
            "name": self._run_name() if is_new else None,
            "group": self._run_group() if is_new else None,
            "config": {"workdir": self._workdir, **self._config},
            # If the workdir is a URL, W&B chooses: WANDB_DIR, or the working directory.
            "dir": self._workdir if is_local else None,
        }
        reason = ""
        wandb.setup(silent)
        try:
            run = wandb.init(**arguments, settings=wandb.Settings(**settings))
        except wandb.Error as error:
            reason = f" ({summarize_error(error)})"
            settings["mode"] = "offline"
            # W&B's process still has the run that could not be started. `wandb.teardown` would end
            # the other runs in this process too.
            wandb.setup().ensure_service().inform_finish(run_id)
            run = wandb.init(**arguments, settings=wandb.Settings(**settings))
        if run.offline:
            _print(f"Weights & Biases is offline{reason}. To upload: {_sync_command(run)}")
        elif run.url:
            _print(f"Weights & Biases: {run.url}")
        return run

    def _run_name(self) -> str | None:
        if self._label is not None:
            # WANDB_NAME would be the name of every run of the suite.
            return self._label.name
        return None if os.environ.get("WANDB_NAME") else os.path.basename(self._workdir.rstrip("/"))

    def _run_group(self) -> str | None:
        if self._label is None or os.environ.get("WANDB_RUN_GROUP"):
            return None
        return self._label.group

    def _read_or_create_id(self) -> tuple[str, bool]:
        """Returns the id of the run, and whether it is new."""
        path = epath.Path(self._workdir) / RUN_ID_FILE
        run_id = path.read_text().strip() if path.exists() else ""
        is_new = not run_id
        if is_new:
            # Sweeps of W&B choose the ids of their runs; one id cannot be that of several runs.
            chosen = os.environ.get("WANDB_RUN_ID", "") if self._label is None else ""
            is_free = chosen and chosen not in _used_ids
            run_id = chosen if is_free else uuid.uuid4().hex[:8]
            atomic_write(path, f"{run_id}\n")
        _used_ids.add(run_id)
        return run_id, is_new


def _define_metrics(run: Any) -> None:
    run.define_metric(_STEP, hidden=True)
    run.define_metric("*", step_metric=_STEP)


def _finish(run: Any, code: int) -> None:
    command = _sync_command(run)
    try:
        run.finish(exit_code=code)
    except TimeoutError:
        _print(f"Weights & Biases has not received all data. To upload the rest: {command}")


def _sync_command(run: Any) -> str:
    return f"wandb sync {os.path.dirname(run.dir)}"


def _print(line: str) -> None:
    """Prints a line without breaking a progress bar."""
    tqdm.write(line, file=sys.stderr)
