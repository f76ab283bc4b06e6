"""From a checkpoint to a model that can be used: its module, its parameters, and what it says."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mixer_jax.config import with_defaults
from mixer_jax.model.mixer import MlpMixer, build_model
from mixer_jax.parallel.sharding import state_sharding
from mixer_jax.weights.checkpoint import Checkpoints, abstract
from mixer_jax.weights.steps import find_checkpoint


class Loaded(NamedTuple):
    """A model ready to use.

    Attributes:
        model: from images to logits.
        params: its parameters, the averaged ones where the run averaged.
        metadata: what the checkpoint says of itself, its config with the keys added since then.
        step: it was saved at.
    """

    model: MlpMixer
    params: Any
    metadata: dict[str, Any]
    step: int


def load_checkpoint(path: str, mesh: Mesh, step: int | None = None) -> Loaded:
    """Loads the model of a run, and nothing of its optimizer.

    Args:
        path: of a run, of its `checkpoints` folder, or of one checkpoint in it.
        mesh: of devices that the parameters are laid out on.
        step: which checkpoint of a run; None: the newest.

    Raises:
        UserError: there is no such checkpoint.
    """
    run, step = find_checkpoint(path, step)
    checkpoints = Checkpoints(run)
    try:
        metadata = checkpoints.metadata(step)
        metadata["config"] = with_defaults(metadata["config"])
        model = build_model(metadata["config"]["model"], len(metadata["class_names"]))
        images = jnp.zeros((1, metadata["image_size"], metadata["image_size"], 3))
        shape = jax.eval_shape(lambda: model.init(jax.random.key(0), images)["params"])
        target = abstract(shape, state_sharding(shape, mesh))
        item = "ema_params" if metadata["ema"] else "params"
        params = checkpoints.restore(step, {item: target})[item]
    finally:
        checkpoints.close()
    return Loaded(model, params, metadata, step)
