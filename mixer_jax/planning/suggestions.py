"""What to change so that a run fits into memory, by estimates."""

from mixer_jax.planning.cost_model import RunSpec, estimate_memory
from mixer_jax.planning.planner import Plan
from mixer_jax.planning.topology import GIB, larger_topologies

REMAT = ("none", "dots", "mlp_hidden", "full")
_ALL_THAT_IS_LEFT = " --config.mesh.data=0"


def suggest_flags(plan: Plan) -> list[str]:
    """Returns flags that should make a run fit, one change each, the cheapest first.

    Estimates are scaled by what the compiler said of this run, where it needs more than estimated.
    """
    work, config = plan.work, plan.config
    needed = plan.training.needed if plan.training and not plan.training.fits else None
    scale = max(1.0, (needed or 0.0) / plan.estimate.total)
    # A mesh that names its data axis does not take another number of devices along the other.
    data = _ALL_THAT_IS_LEFT if config.mesh.data else ""
    tries: list[tuple[str, str, RunSpec]] = []
    for remat in REMAT[REMAT.index(work.remat) + 1 :]:
        flag = f"--config.model.remat={remat}"
        tries.append(("remat", flag, work._replace(remat=remat)))
    for pieces in _doubled(work.pieces):
        flag = f"--config.recipe.grad_accum_steps={pieces}"
        tries.append(("pieces", flag, work._replace(pieces=pieces)))
    for fsdp in _doubled(work.fsdp):
        flag = f"--config.mesh.fsdp={fsdp}{data}"
        tries.append(("fsdp", flag, work._replace(fsdp=fsdp)))
    for topology in larger_topologies(plan.topology):
        flag = f"--topology={topology.text}{data}"
        tries.append(("chips", flag, work._replace(devices=topology.num_devices)))
    found: dict[str, str] = {}
    for kind, flag, changed in tries:
        size = estimate_memory(changed).total * scale
        if size <= plan.allowed and _divides(changed, plan.topology.slices, config.eval_batch_size):
            found.setdefault(kind, f"{flag:<40} about {size / GIB:.1f} GiB")
    return list(found.values())


def _divides(work: RunSpec, slices: int, eval_batch_size: int) -> bool:
    """Returns whether parameters and batches divide over the devices of a run."""
    return not (
        (work.devices // slices) % work.fsdp
        or work.batch_size % (work.devices * work.pieces)
        or eval_batch_size % work.devices
    )


def _doubled(number: int) -> list[int]:
    return [number * 2**power for power in range(1, 8)]
