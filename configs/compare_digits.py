"""Small models of all families on handwritten digits with equal training FLOPs, for `compare`.

    python -m mixer_jax.compare
    python -m mixer_jax.main --config=configs/compare_digits.py:vit    # or mixer, bit

Data: 8 x 8 pixels, shipped with scikit-learn; 1,437 training and 360 test images.
Hyperparameters are those of configs/digits.py, with which Mixer was trained before. The learning
rates of ViT and BiT were chosen by training on the first 80 % of the training split and evaluating
on its other 287 images, with half the steps and twice the batch:
ViT 0.001: 60.3 %, 0.003: 78.1 %; BiT 0.003: 99.0 %, 0.01: 99.7 %.
"""

from typing import Any

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError
from mixer_jax.models.registry import get_family

# Training FLOPs of every model; a step costs three forward passes.
TRAIN_FLOPS = 5e11
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixer": {
        "num_blocks": 4,
        "patch_size": 8,
        "hidden_dim": 64,
        "tokens_mlp_dim": 32,
        "channels_mlp_dim": 256,
    },
    "vit": {
        "num_blocks": 4,
        "patch_size": 8,
        "hidden_dim": 64,
        "mlp_dim": 256,
        "num_heads": 4,
    },
    "bit": {"units": "1,1,1", "root_width": 16},
}
LEARNING_RATES = {"mixer": 3e-3, "vit": 3e-3, "bit": 1e-2}


def get_config(family: str = "mixer") -> ConfigDict:
    """Builds the config of a family."""
    if family not in ARCHITECTURES:
        raise UserError(f"argument must be one of {', '.join(ARCHITECTURES)}, got {family!r}.")
    config = config_lib.get_default()
    config.batch_size = 64
    config.eval_batch_size = 360
    config.image_size = 32
    config.log_every_steps = 50

    config.model.family = family
    config.model.variant = "custom"
    for name, value in ARCHITECTURES[family].items():
        config.model[name] = value
    architecture = get_family(family).get_config("custom", **ARCHITECTURES[family])
    forward = get_family(family).forward_flops(architecture, config.image_size, 10)
    config.num_steps = round(TRAIN_FLOPS / (3 * forward * config.batch_size))

    config.dataset.name = "digits/all"
    config.preprocess.train_crop = "random_shift"
    config.preprocess.max_shift = 4
    config.preprocess.flip = False
    config.preprocess.eval_crop = "resize"

    config.recipe.loss = "softmax"
    config.recipe.mixup = 0.2
    config.optimizer.learning_rate = LEARNING_RATES[family]
    config.optimizer.warmup_steps = config.num_steps // 10
    config.optimizer.decay_type = "cosine"
    config.optimizer.weight_decay = 0.1

    config.checkpoint.every_steps = 200
    config.evals = config_lib.evals(test={"split": "test"})
    return config
