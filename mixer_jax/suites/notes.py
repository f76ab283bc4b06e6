"""Notes below a table: what it costs here and in the paper, and whether sizes are the paper's."""

from typing import Any

from mixer_jax.checkpoints.model_info import format_image_size
from mixer_jax.suites.paper_results import PaperRow
from mixer_jax.suites.plan import TransferPlan
from mixer_jax.suites.tasks import FineTuneTask

# Marks what was taken from the paper.
MARK = "*"


def largest_image_size(plan: TransferPlan) -> int:
    """Returns the largest size that a task of a suite is fine-tuned at, or of probes alone, theirs.

    It is that of the paper's row, and the one to measure throughput at.
    """
    tuned = [task for task in plan.suite.tasks if isinstance(task, FineTuneTask)]
    return max(plan.image_sizes[task.name] for task in tuned or plan.suite.tasks)


def cost_notes(
    plan: TransferPlan, paper: PaperRow | None, measured: dict[str, Any] | None
) -> list[str]:
    """Returns the notes of throughput and pre-training.

    Args:
        plan: of the suite.
        paper: the row to compare with, if there is one.
        measured: the fields of a `Throughput`, if it was measured.
    """
    notes = []
    if measured:
        size = format_image_size(measured["image_size"])
        there = ""
        if paper:
            differs = size != format_image_size((paper.image_size, paper.image_size))
            where = f" at {paper.image_size} px" if differs else ""
            there = f"; paper{MARK}: {paper.images_per_second:,} a core{where}"
        notes.append(
            f"throughput: {measured['images_per_second']:,.0f} images/s on one "
            f"{measured['device']} at {size}, in batches of {measured['batch_size']}{there}"
        )
    if plan.device_days or paper:
        here = f"{plan.device_days:.3g} device-days" if plan.device_days else "not known here"
        there = f"; paper{MARK}: {paper.core_days:,} core-days" if paper else ""
        notes.append(f"pre-training: {here}{there}")
    return notes


def size_notes(plan: TransferPlan, paper: PaperRow) -> list[str]:
    """Returns a note if tasks are fine-tuned at another size than the paper's row."""
    others = [
        f"{task.name} ({plan.image_sizes[task.name]} px)"
        for task in plan.suite.tasks
        if isinstance(task, FineTuneTask) and plan.image_sizes[task.name] != paper.image_size
    ]
    return [f"tasks at other sizes than the paper's row: {', '.join(others)}"] if others else []
