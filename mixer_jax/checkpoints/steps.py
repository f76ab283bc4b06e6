"""Which checkpoints a run has; reads names only, so it costs no orbax."""

from etils import epath

from mixer_jax.errors import UserError

CHECKPOINT_DIR = "checkpoints"
COMMITTED = "commit_success.txt"
INDEX = "_CHECKPOINT_METADATA"


def list_steps(workdir: str) -> list[int]:
    """Returns the steps of a run's complete checkpoints, in order."""
    folder = epath.Path(workdir) / CHECKPOINT_DIR
    if not folder.is_dir():
        return []
    complete = (
        int(entry.name)
        for entry in folder.iterdir()
        # A disk renames a finished save, and what was copied half lacks orbax's index; an object
        # store cannot rename, and gets a mark.
        if entry.name.isdecimal() and (entry / (COMMITTED if "://" in workdir else INDEX)).exists()
    )
    return sorted(complete)


def find_checkpoint(path: str, step: int | None = None) -> tuple[str, int]:
    """Returns a checkpoint as (run, step).

    Args:
        path: of a run, of its `checkpoints` folder, or of one checkpoint in it.
        step: which checkpoint of a run; None: the newest.

    Raises:
        UserError: nothing there, or not this step.
    """
    place = epath.Path(path).expanduser()
    place = place if "://" in path else place.resolve()
    if place.name.isdecimal() and place.parent.name == CHECKPOINT_DIR:
        step = int(place.name) if step is None else step
        place = place.parent
    run = str(place.parent if place.name == CHECKPOINT_DIR else place)
    steps = list_steps(run)
    if not steps:
        raise UserError(f"checkpoint {path!r} holds no checkpoint; name a run's folder")
    if step is not None and step not in steps:
        known = ", ".join(map(str, steps))
        raise UserError(f"checkpoint {path!r} has no step {step}; it has {known}")
    return run, steps[-1] if step is None else step
