"""What to change so that a run fits into memory, by estimates."""

from mixer_jax.planning.formulas import Work, memory
from mixer_jax.planning.planner import Plan

REMAT = ("none", "dots", "mlp_hidden", "full")
_GIB = 2**30


def advice(plan: Plan) -> list[str]:
    """Returns settings that should make a run fit, one change each, the cheapest first.

    Estimates are scaled by what the compiler said of this run, where it needs more than estimated.
    """
    work, allowed = plan.work, plan.allowed
    needed = plan.training.needed if plan.training and not plan.training.fits else 0.0
    scale = max(1.0, needed / plan.estimate.total)
    tries: list[tuple[str, Work]] = []
    for remat in REMAT[REMAT.index(work.remat) + 1 :]:
        tries.append((f"--config.model.remat={remat}", work._replace(remat=remat)))
    for pieces in _doubled(work.pieces):
        if work.batch_size % (work.devices * pieces) == 0:
            flag = f"--config.recipe.accumulation_steps={pieces}"
            tries.append((flag, work._replace(pieces=pieces)))
    for fsdp in _doubled(work.fsdp):
        if work.devices % fsdp == 0:
            tries.append((f"--config.mesh.fsdp={fsdp}", work._replace(fsdp=fsdp)))
    for devices in _doubled(work.devices):
        if work.batch_size % (devices * work.pieces) == 0:
            chips = devices // plan.topology.chip.devices
            tries.append((f"{chips:,} chips", work._replace(devices=devices)))
    found: dict[str, str] = {}
    for text, changed in tries:
        size = memory(changed).total * scale
        kind = text.split("=")[0] if "=" in text else "chips"
        if size <= allowed:
            found.setdefault(kind, f"{text:<40} about {size / _GIB:.1f} GiB")
    return list(found.values())


def _doubled(number: int) -> list[int]:
    return [number * 2**power for power in range(1, 8)]
