"""What a run begins with: fresh weights, those of `config.init_from`, or its own checkpoint."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from mixer_jax.checkpoints.load import PretrainedWeights, load_checkpoint, resize
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.checkpoints.model_info import ModelInfo, get_metadata
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, list_steps
from mixer_jax.checkpoints.to_device import shard_params
from mixer_jax.config.config import architecture_overrides
from mixer_jax.errors import UserError
from mixer_jax.models.family import CUSTOM, INIT_FROM
from mixer_jax.models.mixer_config import get_config
from mixer_jax.models.registry import get_family
from mixer_jax.training.setup import Experiment
from mixer_jax.training.step import TrainState


class InitSource(NamedTuple):
    """What a run begins with, if it does not begin afresh.

    Attributes:
        about: the weights, at the run's image size.
        weights: those of `config.init_from`; None: the run goes on from its own checkpoint.
    """

    about: ModelInfo
    weights: PretrainedWeights | None


def find_init_source(
    config: ConfigDict, workdir: str, weights: PretrainedWeights | None = None
) -> InitSource | None:
    """Returns what a run begins with; None: weights drawn at random.

    Args:
        config: of the run.
        workdir: absolute path or URL of the run; nothing is changed in it.
        weights: those of `config.init_from`, where they are loaded already.

    Raises:
        UserError: the weights of `config.init_from` cannot be had, or are of another model.
    """
    steps = list_steps(workdir)
    if steps:
        checkpoints = CheckpointManager(workdir)
        try:
            metadata = checkpoints.metadata(steps[-1])
        finally:
            checkpoints.close()
        where = f"checkpoint {workdir}/{CHECKPOINT_DIR}/{steps[-1]}"
        return InitSource(ModelInfo.from_metadata(metadata, where), None)
    if not config.init_from:
        return None
    weights = weights or load_checkpoint(config.init_from)
    if config.model.variant != INIT_FROM:
        _check_model(config, weights.model_info)
    weights = resize(weights, (config.image_size, config.image_size))
    return InitSource(weights.model_info, weights)


def restore_or_init(
    experiment: Experiment, checkpoints: CheckpointManager, step: int, beginning: InitSource | None
) -> tuple[TrainState, list[float]]:
    """Returns what was saved at `step`; for step 0 the initial state and an empty window.

    Args:
        experiment: that is run.
        checkpoints: of the run.
        step: it goes on from; 0: none.
        beginning: from `find_init_source`.

    Raises:
        UserError: the checkpoint was trained on other data, or for another number of steps; or
            the head that is to be kept is of other classes.
    """
    if step == 0:
        return init_state(experiment, beginning and beginning.weights), []
    metadata, where = checkpoints.metadata(step), f"the checkpoint of step {step}"
    theirs = metadata | {"class_names": list(ModelInfo.from_metadata(metadata, where).class_names)}
    ours = experiment.metadata | {"class_names": list(experiment.about.class_names)}
    for key in ("num_train_examples", "num_steps", "class_names"):
        was, now = get_metadata(theirs, key, where), ours[key]
        if was != now:
            raise UserError(
                f"{where} was made with {key}={was}, not {now}: the data are "
                "others than the run began with; point --config.dataset.data_dir at those, or put "
                "the folder's images back, or choose another --workdir"
            )
    shape = experiment.state_shape
    targets = {"params": shape.params, "optimizer": shape.opt_state}
    if shape.ema_params is not None:
        targets["ema_params"] = shape.ema_params
    items = checkpoints.restore(step, targets)
    steps_done = jax.device_put(jnp.int32(step), shape.step.sharding)
    state = TrainState(steps_done, items["params"], items["optimizer"], items.get("ema_params"))
    return state, get_metadata(metadata, "loss_window", where)


def init_state(experiment: Experiment, weights: PretrainedWeights | None) -> TrainState:
    """Returns the state before the first step.

    Args:
        experiment: that is run.
        weights: for the run's image size, of which all but the head is taken, and the head too if
            `should_keep_head`; None: weights drawn at random.

    Raises:
        UserError: as `should_keep_head`.
    """
    state = experiment.create_state()
    if weights is None:
        return state
    params = shard_params(weights.params, experiment.mesh)
    if not should_keep_head(experiment, weights.model_info):
        params = {**params, "head": state.params["head"]}
    ema_params = jax.tree.map(jnp.copy, params) if state.ema_params is not None else None
    return state._replace(params=params, ema_params=ema_params)


def should_keep_head(experiment: Experiment, about: ModelInfo) -> bool:
    """Says whether a run begins with the head of the weights it begins with.

    Raises:
        UserError: it is told to, and they are of other classes.
    """
    wish, ours = experiment.config.init_head, experiment.about.class_names
    same = about.class_names == ours
    if wish == "keep" and not (same or (not about.class_names and about.num_classes == len(ours))):
        raise UserError(
            f"config.init_head='keep', but config.init_from={experiment.config.init_from!r} has "
            f"{about.num_classes} classes that are not the {len(ours)} of the data; set it to new"
        )
    return wish == "keep" or (wish == "auto" and same)


def describe_init(experiment: Experiment, beginning: InitSource | None) -> str:
    """Returns a line for people on the weights a run begins with; empty where there is no news."""
    if beginning is None or beginning.weights is None:
        return ""
    about = beginning.about
    how = f", {about.resize_note}" if about.resize_note else ""
    head = "with their head" if should_keep_head(experiment, about) else "with a new head"
    return f"weights of {experiment.config.init_from}{how}, {head}\n"


def _check_model(config: ConfigDict, trained: ModelInfo) -> None:
    """Raises UserError if weights are not of the model that the config declares."""
    widths = get_config(config.model.variant, **architecture_overrides(config.model))
    family, resized = get_family(trained.family), trained.config
    if config.image_size >= family.image_size_multiple(trained.config):
        size = (config.image_size, config.image_size)
        resized = family.resize_config(trained.config, trained.image_size, size).config
    # The config can have the dimensions before tiling, as in the paper, or after it.
    if widths not in (trained.config, resized):
        found = trained.variant
        if found in (CUSTOM, config.model.variant):
            found = ", ".join(f"{k}={v}" for k, v in dataclasses.asdict(trained.config).items())
        raise UserError(
            f"config.init_from={config.init_from!r} is of another model, {found}; set "
            f"--config.model.variant={INIT_FROM} to take its"
        )
    if config.model.gelu != trained.gelu:
        raise UserError(
            f"config.init_from={config.init_from!r} was trained with gelu={trained.gelu}; set "
            f"--config.model.gelu={trained.gelu}, or --config.model.variant={INIT_FROM}"
        )
