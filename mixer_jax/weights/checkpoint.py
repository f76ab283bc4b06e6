"""Checkpoints of a run, by orbax: save, keep, restore, and what a checkpoint says of itself.

A checkpoint `WORKDIR/checkpoints/STEP` holds `params`, `ema_params` (where the recipe averages),
`optimizer`, and `metadata`: a small JSON with all that is needed to use the weights later. A step's
folder gets its name only when it is complete, so an interrupted save is never taken for one.
"""

from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from mixer_jax.errors import UserError
from mixer_jax.weights.steps import FOLDER

Tree = Any


class Checkpoints:
    """The checkpoints of one run."""

    def __init__(self, workdir: str, keep: int | None = None):
        """Opens `workdir`/checkpoints; to write, makes it and clears unfinished saves away.

        Args:
            workdir: absolute path or URL of the run.
            keep: number of checkpoints kept, the newest; None: only reads.
        """
        reading = keep is None
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            create=not reading,
            read_only=reading,
            cleanup_tmp_directories=not reading,
        )
        self._manager = ocp.CheckpointManager(epath.Path(workdir) / FOLDER, options=options)

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
        """Returns the items that `targets` names, with its shapes, types and shardings."""
        args = {name: ocp.args.StandardRestore(tree) for name, tree in targets.items()}
        try:
            restored = self._manager.restore(step, args=ocp.args.Composite(**args))
        except (KeyError, FileNotFoundError) as error:
            raise UserError(
                f"the checkpoint of step {step} lacks {' or '.join(targets)}: it is incomplete; "
                "move its folder away to use an older one"
            ) from error
        return {name: restored[name] for name in targets}

    def metadata(self, step: int) -> dict[str, Any]:
        """Returns what the checkpoint says of itself."""
        args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
        return self._manager.restore(step, args=args)["metadata"]

    def close(self) -> None:
        """Waits until everything is written."""
        self._manager.close()


def abstract(tree: Tree, sharding: Tree) -> Tree:
    """Returns shapes and types of `tree` with the shardings of a like tree, as restore wants it."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, sharding
    )
