"""Checkpoints of a run, by orbax: save, keep, restore, and what a checkpoint says of itself.

A checkpoint `WORKDIR/checkpoints/STEP` holds `params`, `ema_params` (where the recipe averages),
`optimizer`, and `metadata`: a small JSON with all that is needed to use the weights later. A step's
folder gets its name only when it is complete, so an interrupted save is never taken for one.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from mixer_jax.checkpoints import tree as trees
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR
from mixer_jax.errors import UserError, summarize_error

Tree = Any

# Chunk and file size of `save_params_streaming`, in bytes; each writer thread holds some chunks.
_PIECE, _FILE = 2**22, 2**25


class CheckpointManager:
    """The checkpoints of one run."""

    def __init__(self, workdir: str, max_to_keep: int | None = None):
        """Opens `workdir`/checkpoints; to write, makes it and clears unfinished saves away.

        Args:
            workdir: absolute path or URL of the run.
            max_to_keep: number of checkpoints kept, the newest; None: only reads.
        """
        reading = max_to_keep is None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=max_to_keep,
            create=not reading,
            read_only=reading,
            cleanup_tmp_directories=not reading,
        )
        self._folder = epath.Path(workdir) / CHECKPOINT_DIR
        self._manager = ocp.CheckpointManager(self._folder, options=options)

    def latest_step(self) -> int | None:
        """Returns the newest complete checkpoint's step, or None."""
        return self._manager.latest_step()

    def save(self, step: int, items: dict[str, Tree], metadata: dict[str, Any]) -> None:
        """Begins to save; returns when the arrays are copied, and writes in the background.

        Args:
            step: name of the checkpoint.
            items: trees of arrays by name.
            metadata: plain data, saved beside them as JSON.
        """
        trees = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args = ocp.args.Composite(metadata=ocp.args.JsonSave(metadata), **trees)
        self._manager.save(step, args=args, force=True)

    def restore(self, step: int, targets: dict[str, Tree]) -> dict[str, Tree]:
        """Returns the items that `targets` names, with its shapes, types and shardings.

        Raises:
            UserError: the checkpoint is incomplete or damaged.
        """
        args = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        with self._telling_damage(step):
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
            return {name: restored[name] for name in targets}

    def iter_restore(self, step: int, item: str) -> Iterator[tuple[str, np.ndarray]]:
        """Yields every array of an item by its path, to have one of them in memory at a time.

        Raises:
            UserError: the checkpoint is incomplete or damaged.
        """
        with self._telling_damage(step):
            saved = ocp.PyTreeCheckpointHandler().metadata(self._folder / str(step) / item).tree
            leaves = dict(trees.flatten(saved))
        for path, leaf in leaves.items():
            args = ocp.args.PyTreeRestore(
                trees.unflatten({path: np.empty(leaf.shape, leaf.dtype)}),
                restore_args=trees.unflatten({path: ocp.RestoreArgs(restore_type=np.ndarray)}),
                partial_restore=True,
            )
            with self._telling_damage(step):
                restored = self._manager.restore(step, args=ocp.args.Composite(**{item: args}))
            yield from trees.flatten(restored[item])

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what the checkpoint says of itself.

        Raises:
            UserError: the checkpoint is incomplete or damaged.
        """
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        with self._telling_damage(step):
            metadata = self._manager.restore(step, args=args)["metadata"]
            if not isinstance(metadata, dict):
                raise TypeError("its metadata are no JSON object")
            return metadata

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()

    @contextmanager
    def _telling_damage(self, step: int) -> Iterator[None]:
        hook = sys.unraisablehook
        sys.unraisablehook = _without_abandoned_reads(hook)
        try:
            yield
        except (MemoryError, jax.errors.JaxRuntimeError):
            # Devices that fail or are full: the checkpoint may be all right.
            raise
        except Exception as error:
            # What orbax stumbles over is no closed list. The hook stays: reads may still end.
            warnings.filterwarnings("ignore", ".*was never awaited", RuntimeWarning)
            raise UserError(
                f"checkpoint {self._folder / str(step)} is incomplete or damaged "
                f"({summarize_error(error)}); name an older step, or move this one's folder away"
            ) from error
        sys.unraisablehook = hook


def _without_abandoned_reads(then: Callable[[Any], object]) -> Callable[[Any], object]:
    """Returns a hook for errors that nobody catches, without those of orbax's abandoned reads.

    After one array that cannot be read, orbax does not wait for the others, and each of them prints
    a stack trace when it ends.
    """

    def hook(unraisable: Any) -> None:
        said = str(unraisable.exc_value)
        if said != "Event loop is closed" and not said.endswith("was never awaited"):
            then(unraisable)

    return hook


def save_params_streaming(workdir: str, step: int, params: Tree, metadata: dict[str, Any]) -> None:
    """Writes a checkpoint of `params` alone, with little memory beside them.

    `CheckpointManager.save` copies them, to write in the background, all at once.

    Args:
        workdir: absolute path, of a folder that holds no checkpoints.
        step: name of the checkpoint.
        params: tree of NumPy arrays.
        metadata: plain data, saved beside them as JSON.
    """
    handler = ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)
    registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, handler))
    manager = ocp.CheckpointManager(
        epath.Path(workdir) / CHECKPOINT_DIR,
        item_handlers={
            "params": ocp.PyTreeCheckpointHandler(type_handler_registry=registry),
            "metadata": ocp.JsonCheckpointHandler(),
        },
    )
    in_pieces = ocp.args.PyTreeSave(
        params,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_PIECE), params),
        ocdbt_target_data_file_size=_FILE,
    )
    args = ocp.args.Composite(params=in_pieces, metadata=ocp.args.JsonSave(metadata))
    manager.save(step, args=args)
    manager.close()


def abstract_state(tree: Tree, sharding: Tree) -> Tree:
    """Returns shapes and types of `tree` with the shardings of a like tree, as restore wants it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )
