"""State of a run: random, from a pretrained checkpoint, or restored from and saved in its own."""

import contextlib
import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from mixer_jax.checkpoints.load import load_checkpoint, pin_checkpoint
from mixer_jax.checkpoints.manager import CheckpointManager
from mixer_jax.checkpoints.model_info import ModelInfo, get_metadata
from mixer_jax.checkpoints.resolve import CHECKPOINT_DIR, DAMAGED_DIR, list_saved_steps
from mixer_jax.checkpoints.weights import PretrainedWeights, resize
from mixer_jax.config.schema import RunConfig
from mixer_jax.data.source import describe_changes
from mixer_jax.distributed import multihost
from mixer_jax.distributed.sharding import shard_params
from mixer_jax.errors import RunError, UserError, abbreviate
from mixer_jax.models.family import CUSTOM, INIT_FROM
from mixer_jax.models.registry import DEFAULT_FAMILY, get_family
from mixer_jax.training.setup import Experiment, should_keep_head
from mixer_jax.training.step import TrainState
from mixer_jax.training.workdir import moved_folders


class InitSource(NamedTuple):
    """Checkpoint that a run starts or resumes from, at the image size of the run.

    Attributes:
        model_info: Description of the model.
        weights: Weights of `config.init_from`; None if the run resumes from its own checkpoint.
        resume_step: Step that the run resumes from, whose files have been verified; 0: none.
        metadata: Metadata of the checkpoint that the run resumes from, or None.
        notes: Lines about newer checkpoints, which are damaged.
        damaged_steps: Steps of these checkpoints.
    """

    model_info: ModelInfo
    weights: PretrainedWeights | None
    resume_step: int = 0
    metadata: dict[str, Any] | None = None
    notes: tuple[str, ...] = ()
    damaged_steps: tuple[int, ...] = ()


def find_init_source(
    config: RunConfig, workdir: str, weights: PretrainedWeights | None = None
) -> InitSource | None:
    """Finds the checkpoint that a run starts or resumes from; None: random initialization.

    All hosts must call it together, and get the same answer. `weights` are those of
    `config.init_from`, if already loaded. The workdir is only read.

    Raises:
        UserError: `config.init_from` cannot be loaded, or is another model than the config's; or
            the run has checkpoints, and all of them are damaged.
    """
    steps = multihost.compute_once(lambda: list_saved_steps(workdir))
    if steps:
        return _find_valid_checkpoint(workdir, steps)
    if not config.init_from:
        return None
    if weights is None:
        source, step = multihost.compute_once(lambda: pin_checkpoint(config.init_from))
        weights = load_checkpoint(source, step=step)
    _check_same_family(config, weights.model_info)
    if config.model.variant != INIT_FROM:
        _check_same_model(config, weights.model_info)
    weights = resize(weights, (config.image_size, config.image_size))
    return InitSource(weights.model_info, weights)


def _find_valid_checkpoint(workdir: str, steps: list[int]) -> InitSource:
    """Finds the newest checkpoint that is not damaged; each host verifies a part of the files.

    All hosts must call it together, and get the same answer.

    Raises:
        UserError: All checkpoints are damaged.
        RunError: A file cannot be read, perhaps only for the moment.
    """
    checkpoints = CheckpointManager(workdir)
    folder = f"{workdir}/{CHECKPOINT_DIR}"
    notes: list[str] = []
    damaged: list[int] = []
    try:
        for step in reversed(steps):
            problem = _find_damage(checkpoints, step)
            if not problem:
                metadata, problem = multihost.compute_once(
                    functools.partial(_read_metadata, checkpoints, step)
                )
            if not problem:
                info = ModelInfo.from_metadata(metadata, f"{folder}/{step}")
                return InitSource(info, None, step, metadata, tuple(notes), tuple(damaged))
            notes.append(f"checkpoint {folder}/{step} is damaged ({problem})")
            damaged.append(step)
    finally:
        checkpoints.close()
    raise UserError(
        f"{'; '.join(notes)}. The run has no valid checkpoint to resume from: restore one, or move "
        f"{folder} elsewhere to start again."
    )


def _find_damage(checkpoints: CheckpointManager, step: int) -> str:
    """Returns the damage of a checkpoint, or "", the same on all hosts.

    Raises:
        RunError: A host cannot read a file, perhaps only for the moment; raised on all hosts.
    """
    damage = failure = ""
    try:
        damage = checkpoints.find_damage(step, jax.process_index(), jax.process_count())
    except RunError as error:
        failure = str(error)
    for message in filter(None, multihost.gather_text(failure)):
        raise RunError(message)
    return next(filter(None, multihost.gather_text(damage)), "")


def _read_metadata(checkpoints: CheckpointManager, step: int) -> tuple[dict[str, Any], str]:
    """Reads the metadata of a verified checkpoint; returns it and what is wrong with it, or ""."""
    try:
        return checkpoints.metadata(step, is_verified=True), ""
    except UserError as error:
        return {}, str(error.__cause__ or error)


def restore_or_init(
    experiment: Experiment, checkpoints: CheckpointManager, init: InitSource | None
) -> tuple[TrainState, list[float]]:
    """Restores state and loss window of `init.resume_step`, or initializes them at step 0.

    All hosts must call it together.

    Raises:
        UserError: The checkpoint was trained on other data or for another number of steps, or the
            head to keep has other classes.
    """
    if init is None or init.metadata is None:
        return init_state(experiment, init and init.weights), []
    step, source = init.resume_step, f"the checkpoint of step {init.resume_step}"
    _check_same_data(experiment, init.metadata, source)
    shape = experiment.state_shape
    items = checkpoints.restore(step, _checkpoint_items(shape), is_verified=True)
    steps_taken = jax.device_put(jnp.int32(step), shape.step.sharding)
    state = TrainState(steps_taken, items["params"], items["optimizer"], items.get("ema_params"))
    return state, get_metadata(init.metadata, "loss_window", source)


def save_state(
    experiment: Experiment,
    checkpoints: CheckpointManager,
    state: TrainState,
    step: int,
    loss_window: list[float],
) -> None:
    """Starts saving a state, and the losses not logged yet, in the background.

    All hosts must call it together.
    """
    metadata = experiment.metadata | {"loss_window": list(loss_window)}
    checkpoints.save(step, _checkpoint_items(state), metadata)


def _checkpoint_items(state: TrainState) -> dict[str, Any]:
    items = {"params": state.params, "optimizer": state.opt_state}
    return items if state.ema_params is None else items | {"ema_params": state.ema_params}


def init_state(experiment: Experiment, weights: PretrainedWeights | None) -> TrainState:
    """Creates the state before the first step, from pretrained weights or at random.

    All hosts must call it together. The head of the weights is kept if `should_keep_head`.

    Raises:
        UserError: The head to keep has other classes.
    """
    state = experiment.create_state()
    if weights is None:
        return state
    family = get_family(experiment.model_info.family)
    params = shard_params(weights.params, experiment.mesh, family)
    classes = experiment.model_info.class_names
    if not should_keep_head(experiment.config, classes, weights.model_info):
        # A hidden layer of the pretrained head has no counterpart.
        params = {name: params[name] for name in state.params if name != "head"}
        params["head"] = state.params["head"]
    ema_params = jax.tree.map(jnp.copy, params) if state.ema_params is not None else None
    return state._replace(params=params, ema_params=ema_params)


def describe_init(experiment: Experiment, init: InitSource | None) -> str:
    """Formats lines about pretrained weights, or about checkpoints that are not resumed from."""
    if init is None:
        return ""
    if init.weights is None:
        return "".join(f"{note}; moved to {DAMAGED_DIR}\n" for note in init.notes)
    info = init.model_info
    resized = f", {info.resize_note}" if info.resize_note else ""
    classes = experiment.model_info.class_names
    is_kept = should_keep_head(experiment.config, classes, info)
    head = "pretrained head" if is_kept else "new head"
    return f"initialized from {experiment.config.init_from}{resized}, {head}\n"


def _check_same_data(experiment: Experiment, metadata: dict[str, Any], source: str) -> None:
    saved = metadata | {"class_names": list(ModelInfo.from_metadata(metadata, source).class_names)}
    current = experiment.metadata | {"class_names": list(experiment.model_info.class_names)}
    for key in ("num_train_examples", "num_steps", "class_names"):
        was, now = get_metadata(saved, key, source), current[key]
        if was != now:
            raise UserError(
                f"{key} must be as in {source}, {was}, got {now}: the run was started with other "
                "data. Point --config.dataset.data_dir to that data, restore the images of the "
                "folder, or choose another --workdir."
            )
    if "train_data" in metadata:
        changes = describe_changes(metadata["train_data"], experiment.metadata["train_data"])
    else:  # An older version stored only the paths.
        changes = moved_folders(get_metadata(metadata, "config", source), experiment.config)
    if changes:
        raise UserError(
            f"training data must be as in {source}, got other {abbreviate(changes, 4)}. Restore "
            "the data to resume, or choose another --workdir to train with the changed data."
        )


def _check_same_family(config: RunConfig, pretrained: ModelInfo) -> None:
    """Raises UserError if weights are of another family than the config declares.

    With the variant "init_from", the default family declares none.
    """
    accepted = {pretrained.family}
    if config.model.variant == INIT_FROM:
        accepted.add(DEFAULT_FAMILY)
    if config.model.family not in accepted:
        name = get_family(pretrained.family).full_name(pretrained.variant)
        raise UserError(
            f"config.model.family must be {pretrained.family!r}, as config.init_from="
            f"{config.init_from!r} is a {name}, got {config.model.family!r}. Use weights of "
            f"{get_family(config.model.family).display_name}, or set --config.model.family="
            f"{pretrained.family} and --config.model.variant={INIT_FROM}."
        )


def _check_same_model(config: RunConfig, pretrained: ModelInfo) -> None:
    """Raises UserError if weights are for another architecture than the config declares."""
    family = get_family(config.model.family)
    source = f"config.init_from={config.init_from!r}"
    # A config may declare the architecture before or after adapting it to another image size.
    accepted = [pretrained.config]
    size = (config.image_size, config.image_size)
    with contextlib.suppress(UserError):
        family.check_image_size(pretrained.config, *size)
        accepted.append(family.resize_config(pretrained.config, pretrained.image_size, size).config)
    accepted += map(family.config_for_new_head, list(accepted))
    if config.model.architecture not in accepted:
        found = pretrained.variant
        if found in (CUSTOM, config.model.variant):
            fields = dataclasses.asdict(pretrained.config)
            found = ", ".join(f"{name}={value}" for name, value in fields.items())
        raise UserError(
            f"config.model must be the model of {source}, {found}. Set "
            f"--config.model.variant={INIT_FROM} to use it."
        )
    if config.model.gelu != pretrained.gelu:
        raise UserError(
            f"config.model.gelu must be that of {source}, got {config.model.gelu}. Set "
            f"--config.model.gelu={pretrained.gelu}, or --config.model.variant={INIT_FROM}."
        )
