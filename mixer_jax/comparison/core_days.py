"""Core-days of a run on a topology that is not attached, planned in a separate process.

In that process JAX does not use this machine's devices; see `planning.topology.ENVIRONMENT`.
"""

import dataclasses
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor

from mixer_jax.config.schema import RunConfig


def plan_core_days(
    config: RunConfig, num_classes: int, num_train: int, topology: str
) -> float | None:
    """Plans a run; returns its core-days, a lower bound, or None if it does not fit into memory.

    Args:
        config: Run with `num_steps`.
        num_classes: Classes of the training data.
        num_train: Examples of the training data.
        topology: Topology as `plan` names it, such as "v3:4x4".

    Raises:
        UserError: The batch cannot be split over the devices, or the TPU compiler is missing.
    """
    dataset = dataclasses.replace(config.dataset, num_classes=num_classes, num_examples=num_train)
    config = dataclasses.replace(config, dataset=dataset)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_plan, config, topology).result()


def _plan(config: RunConfig, name: str) -> float | None:
    from mixer_jax.planning.topology import ENVIRONMENT, parse_topology

    topology = parse_topology(name)
    # Before JAX is imported.
    os.environ.update(ENVIRONMENT)
    from mixer_jax.planning.planner import make_plan

    plan = make_plan(config, topology, with_eval=False)
    return plan.cost.core_days if plan.cost and plan.train_step_fits else None
