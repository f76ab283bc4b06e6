"""Checkpoints of a run, saved and restored by orbax.

A checkpoint `WORKDIR/checkpoints/STEP` contains `params`, `ema_params` (if the recipe averages
weights), `optimizer`, and `metadata`, a small JSON file with everything needed to use the weights.
The folder of a step gets its name only when it is complete, so an interrupted save is never
mistaken for a checkpoint. On disks, it has checksums of its files, which are verified before
anything is restored.
"""

import inspect
import logging
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mixer_jax.checkpoints.checksums import (
    DamagedFileError,
    has_checksums,
    read_errors,
    require_checksums,
    verify_checksums,
    write_checksums,
)
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, COMMITTED, DAMAGED_DIR, INDEX
from mixer_jax.checkpoints.weights import flatten_params, unflatten_params
from mixer_jax.errors import RunError, UserError, describe_lost_host, summarize_error
from mixer_jax.files import name_file, parse_json, remove_abandoned, sync, sync_tree

Tree = Any

# Sizes of chunks and of files of `save_params_streaming`, in bytes. Each writer thread holds a few
# chunks in memory.
_CHUNK_SIZE, _FILE_SIZE = 2**22, 2**25
# Entry of the metadata of a checkpoint with checksums, so that it is noticed if they are missing.
_HAS_CHECKSUMS = "has_checksums"
_METADATA = "metadata"


class _ChecksummedPath(ocp.path.atomicity.AtomicRenameTemporaryPath):
    """Temporary folder of a step, which is complete and synced before it gets its name.

    In the thread that writes the checkpoint, and on the primary process only.
    """

    async def finalize(self) -> None:
        # Items are written to temporary folders as well.
        is_step = self.get_final().name.isdecimal()
        if is_step:
            # orbax changes or writes these two when it renames the folder.
            write_checksums(Path(self.get()), exclude=(INDEX, COMMITTED))
            # orbax syncs arrays, but not their metadata. Older checkpoints are removed only after
            # this one survives a loss of power.
            sync_tree(Path(self.get()))
        await super().finalize()
        if is_step:
            final = Path(self.get_final())
            for path in (final / INDEX, final / COMMITTED, final, final.parent):
                sync(path)


# From steps to the one to keep, if any.
FindBestStep = Callable[[Sequence[int]], int | None]


class _KeepBest:
    """Preservation policy of orbax that keeps the best checkpoint."""

    def __init__(self, find_best: FindBestStep):
        self._find_best = find_best

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        """Returns for each checkpoint whether it is the best one."""
        best = self._find_best([checkpoint.step for checkpoint in checkpoints])
        return [checkpoint.step == best for checkpoint in checkpoints]


class CheckpointManager:
    """Checkpoints of one run."""

    def __init__(
        self,
        workdir: str,
        max_to_keep: int | None = None,
        *,
        find_best: FindBestStep | None = None,
        checksums: bool = True,
    ):
        """Opens the checkpoints of a run. All hosts must call it together.

        Args:
            workdir: Absolute path or URL of the run.
            max_to_keep: Number of checkpoints to keep, the newest. The folder is created if needed,
                and unfinished saves are deleted. None: open for reading only.
            find_best: Function that selects the best of some steps, whose checkpoint is kept as
                well. It is called at every save and must return the same on all hosts.
            checksums: Whether saves on disks have checksums.
        """
        is_reader = max_to_keep is None
        # Object stores keep and verify their own checksums.
        self._is_remote = "://" in workdir
        self._has_checksums = checksums and not self._is_remote
        self._max_to_keep, self._find_best = max_to_keep, find_best
        kept: dict[str, Any] = {"max_to_keep": max_to_keep}
        if find_best is not None:
            # orbax deletes checkpoints only once the one that is being saved is complete.
            policies = ocp.checkpoint_managers
            newest, best = policies.LatestN(max_to_keep), _KeepBest(find_best)
            kept = {"preservation_policy": policies.AnyPreservationPolicy([newest, best])}
        options = ocp.CheckpointManagerOptions(
            **kept,
            create=not is_reader,
            read_only=is_reader,
            cleanup_tmp_directories=not is_reader,
            # The default of orbax depends on the object store.
            temporary_path_class=_ChecksummedPath if self._has_checksums else None,
            # If a folder cannot be created in the background, threads of orbax wait for it for five
            # minutes. On disks, creating it takes no time.
            async_options=ocp.options.AsyncOptions(
                create_directories_asynchronously=self._is_remote
            ),
        )
        self._folder = epath.Path(workdir) / CHECKPOINT_DIR
        try:
            with name_file(self._folder):
                self._manager = ocp.CheckpointManager(self._folder, options=options)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            if describe_lost_host(error):
                raise
            # orbax reads the index of every checkpoint.
            raise UserError(
                f"{self._folder} has a checkpoint with a damaged {INDEX} "
                f"({summarize_error(error)}). Move that checkpoint elsewhere."
            ) from error

    def latest_step(self) -> int | None:
        """Returns the step of the newest complete checkpoint, or None."""
        return self._manager.latest_step()

    def all_steps(self) -> list[int]:
        """Returns the steps of all checkpoints, and of saves that have not ended yet."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, items: dict[str, Tree], metadata: dict[str, Any]) -> None:
        """Starts a save of trees of arrays by name, and of JSON-serializable metadata.

        All hosts must call it together. Returns once the arrays are copied; they are written in
        the background.
        """
        _ignore_abandoned_writes()
        saves = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        metadata = metadata | {_HAS_CHECKSUMS: self._has_checksums}
        args = ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **saves)
        # Also raises errors of the previous save.
        with name_file(self._folder):
            self._manager.save(step, args=args, force=True)

    def restore(
        self, step: int, targets: dict[str, Tree], *, is_verified: bool = False
    ) -> dict[str, Tree]:
        """Restores items with the shapes, dtypes and shardings of `targets`.

        All hosts must call it together.

        Args:
            step: Step of the checkpoint.
            targets: Tree of shapes by item.
            is_verified: Whether `find_damage` has found none on any host.

        Raises:
            UserError: The checkpoint is incomplete or damaged.
            RunError: A file cannot be read, perhaps only for the moment.
        """
        args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        # Files on a disk have been verified only if they have checksums.
        is_intact = is_verified and (self._is_remote or has_checksums(self._folder / str(step)))
        with self._damage_errors(step, is_intact=is_intact):
            if not is_verified:
                self._verify(step, *targets)
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            return {name: restored[name] for name in targets}

    def find_damage(self, step: int, worker: int = 0, num_workers: int = 1) -> str:
        """Returns the damaged file of a checkpoint and what is wrong with it; "" if it is intact.

        Contains no collective, because only one host may find the damage. Does not notice missing
        checksums; `metadata` does.

        Args:
            step: Step of the checkpoint.
            worker: Index among the workers that verify a part of the files each.
            num_workers: Number of workers.

        Raises:
            RunError: A file cannot be read, perhaps only for the moment.
        """
        try:
            _read_json(self._folder / str(step), INDEX)
            verify_checksums(self._folder / str(step), worker=worker, num_workers=num_workers)
        except DamagedFileError as error:
            return str(error)
        return ""

    def _verify(self, step: int, *items: str) -> None:
        verify_checksums(self._folder / str(step), items)

    def iter_restore(self, step: int, item: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields the path and the array of each leaf of an item, to hold only one in memory.

        All hosts must iterate together.

        Raises:
            UserError: The checkpoint is incomplete or damaged.
            RunError: A file cannot be read, perhaps only for the moment.
        """
        with self._damage_errors(step):
            self._verify(step, item)
            saved = ocp.PyTreeCheckpointHandler().metadata(self._folder / str(step) / item).tree
            leaves = dict(flatten_params(saved))
        for path, leaf in leaves.items():
            args = ocp.args.PyTreeRestore(
                unflatten_params({path: np.empty(leaf.shape, leaf.dtype)}),
                restore_args=unflatten_params({path: ocp.RestoreArgs(restore_type=np.ndarray)}),
                partial_restore=True,
            )
            with self._damage_errors(step):
                restored = self._manager.restore(step, args=ocp.args.Composite(**{item: args}))
            yield from flatten_params(restored[item])

    def metadata(self, step: int, *, is_verified: bool = False) -> dict[str, Any]:
        """Reads the metadata of a checkpoint. Contains no collective.

        Args:
            step: Step of the checkpoint.
            is_verified: Whether `find_damage` has found none on any host.

        Raises:
            UserError: The checkpoint is incomplete or damaged.
            RunError: A file cannot be read, perhaps only for the moment.
        """
        with self._damage_errors(step):
            if not is_verified:
                self._verify(step, _METADATA)
            # Without orbax, whose restore is a collective.
            metadata = _read_json(self._folder / str(step), f"{_METADATA}/{_METADATA}")
            if not isinstance(metadata, dict):
                raise TypeError("its metadata is not a JSON object")
            if metadata.pop(_HAS_CHECKSUMS, False):
                require_checksums(self._folder / str(step))
            return metadata

    def delete_outdated(self) -> None:
        """Deletes checkpoints that are neither among the newest nor the best.

        A save does so before its own step is evaluated, and may be interrupted. All hosts must call
        it together.
        """
        if self._max_to_keep is None:
            return
        self.wait()
        steps = self.all_steps()
        best = self._find_best(steps) if self._find_best is not None else None
        with name_file(self._folder):
            for step in steps[: -self._max_to_keep]:
                if step != best:
                    self._manager.delete(step)

    def wait(self) -> None:
        """Waits until all saves are written. All hosts must call it together."""
        with name_file(self._folder):
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits until all saves are written. All hosts must call it together."""
        with name_file(self._folder):
            self._manager.close()

    @contextmanager
    def _damage_errors(self, step: int, *, is_intact: bool = False) -> Iterator[None]:
        """Raises UserError if a checkpoint cannot be read, RunError if its files are intact."""
        hook = sys.unraisablehook
        sys.unraisablehook = _AbandonedFilter(hook)
        logging.getLogger("asyncio").addFilter(_is_not_abandoned)
        try:
            yield
        except (MemoryError, RunError, jax.errors.JaxRuntimeError):
            # A device failed or is out of memory, or a file cannot be read for the moment; the
            # checkpoint may be intact.
            raise
        except Exception as error:
            if describe_lost_host(error):
                raise
            # orbax raises errors of many types. The hook stays, because reads may still be ending.
            warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
            if is_intact:
                raise RunError(
                    f"checkpoint {self._folder / str(step)} cannot be read "
                    f"({summarize_error(error)}). Run the same command again; if that does not "
                    "help, move its folder elsewhere."
                ) from error
            raise UserError(
                f"checkpoint {self._folder / str(step)} is incomplete or damaged "
                f"({summarize_error(error)}). Pass an older step, or move its folder elsewhere."
            ) from error
        sys.unraisablehook = hook


def _read_json(folder: Any, file: str) -> Any:
    with read_errors(folder, file):
        content = (folder / file).read_bytes()
    try:
        return parse_json(content)
    except ValueError as error:
        raise DamagedFileError(f"{file} is not valid JSON") from error


class _AbandonedFilter:
    """Filter of a `sys.unraisablehook` that ignores reads and writes that orbax abandoned.

    After the first array that it cannot read or write, orbax does not wait for the others, and each
    of them would print a stack trace when it ends.
    """

    def __init__(self, hook: Callable[[Any], object]):
        self._hook = hook

    def __call__(self, unraisable: Any) -> None:
        message = str(unraisable.exc_value)
        if message != "Event loop is closed" and not message.endswith("was never awaited"):
            self._hook(unraisable)


def _ignore_abandoned_writes() -> None:
    """Ignores writes that orbax abandons, from now on: they are in the background."""
    if not isinstance(sys.unraisablehook, _AbandonedFilter):
        sys.unraisablehook = _AbandonedFilter(sys.unraisablehook)
    warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
    logging.getLogger("asyncio").addFilter(_is_not_abandoned)


def _is_not_abandoned(record: logging.LogRecord) -> bool:
    """Filters what asyncio logs about a failed read or write of orbax that nobody waits for."""
    if "exception was never retrieved" not in record.getMessage():
        return True
    # The message has the error, whose trace tells where it was raised.
    text = logging.Formatter().format(record)
    return "orbax" not in text and "tensorstore" not in text


def remove_unfinished_saves(workdir: str) -> None:
    """Removes what failed saves left in a run's folder on a disk, to free its space."""
    for path in Path(workdir, CHECKPOINT_DIR).glob("*.orbax-checkpoint-tmp*"):
        remove_abandoned(path)


def move_damaged_checkpoints(workdir: str, steps: Iterable[int]) -> None:
    """Moves checkpoints to `DAMAGED_DIR`, so that their steps can be saved again.

    Raises:
        RunError: A folder cannot be moved.
    """
    for step in steps:
        source = epath.Path(workdir) / CHECKPOINT_DIR / str(step)
        target = epath.Path(workdir) / DAMAGED_DIR / str(step)
        try:
            if target.exists():
                target.rmtree()
            target.parent.mkdir(parents=True, exist_ok=True)
            source.rename(target)
        except OSError as error:
            raise RunError(f"{source} cannot be moved to {target}: {error.strerror}.") from error


def save_params_streaming(workdir: str, step: int, params: Tree, metadata: dict[str, Any]) -> None:
    """Saves a checkpoint of `params` only, in chunks.

    `CheckpointManager.save` instead copies all parameters, to write them in the background.

    Args:
        workdir: Absolute path of a folder without checkpoints.
        step: Step of the checkpoint.
        params: NumPy arrays.
        metadata: JSON-serializable metadata.
    """
    _ignore_abandoned_writes()
    handler_class, option = ocp.type_handlers.NumpyHandler, "deepcopy_host_arrays"
    # orbax 0.11, which jax2onnx requires, lacks the option and always copies.
    has_option = option in inspect.signature(handler_class).parameters
    handler = handler_class(**({option: False} if has_option else {}))
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    manager = ocp.CheckpointManager(
        epath.Path(workdir) / CHECKPOINT_DIR,
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            _METADATA: ocp.JsonCheckpointHandler(),
        },
        options=ocp.CheckpointManagerOptions(temporary_path_class=_ChecksummedPath),
    )
    chunked_save = ocp.args.PyTreeSave(
        params,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_SIZE), params),
        ocdbt_target_data_file_size=_FILE_SIZE,
    )
    metadata = metadata | {_HAS_CHECKSUMS: True}
    args = ocp.args.Composite(params=chunked_save, metadata=ocp.args.JsonSave(metadata))
    manager.save(step, args=args)
    manager.close()


def abstract_state(tree: Tree, sharding: Tree) -> Tree:
    """Returns the shapes and dtypes of `tree` with shardings, as `restore` takes them."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )
