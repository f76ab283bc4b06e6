"""Small models of each family on Fashion-MNIST at equal training FLOPs: the paper at laptop scale.

    python -m mixer_jax.main --config=configs/study_fashion_mnist.py:mixer   # or :vit, :bit

docs/concepts/laptop_scale.md has the commands of the three studies. Every run has the same FLOPs,
also with a part of the training images: about 4.2 epochs of all of them.

Tuning: The learning rate of each family is the best of 0.001, 0.003 and 0.006 on `train[90%:]`
        after 600 steps on `train[:90%]`; nothing else was tuned.
"""

from typing import Any

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError
from mixer_jax.models.registry import get_family

# Training FLOPs of every model; a step costs three forward passes.
TRAIN_FLOPS = 5e12
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "mixer": {
        "num_blocks": 3,
        "patch_size": 4,
        "hidden_dim": 48,
        "tokens_mlp_dim": 32,
        "channels_mlp_dim": 192,
    },
    "vit": {
        "num_blocks": 2,
        "patch_size": 4,
        "hidden_dim": 48,
        "mlp_dim": 192,
        "num_heads": 3,
        "pooling": "gap",
    },
    "bit": {"units": "1,1,1", "root_width": 24},
}
LEARNING_RATES = {"mixer": 6e-3, "vit": 6e-3, "bit": 3e-3}


def get_config(family: str = "mixer") -> ConfigDict:
    """Builds the config of a family."""
    if family not in ARCHITECTURES:
        raise UserError(f"argument must be one of {', '.join(ARCHITECTURES)}, got {family!r}.")
    config = config_lib.get_default()
    config.batch_size = 128
    config.eval_batch_size = 1_000
    config.image_size = 28
    config.log_every_steps = 100

    config.model.family = family
    config.model.variant = "custom"
    for name, value in ARCHITECTURES[family].items():
        config.model[name] = value
    architecture = get_family(family).get_config("custom", **ARCHITECTURES[family])
    forward = get_family(family).forward_flops(architecture, config.image_size, 10)
    config.num_steps = round(TRAIN_FLOPS / (3 * forward * config.batch_size))

    config.dataset.name = "fashion_mnist"
    config.dataset.num_classes = 10
    config.preprocess.train_crop = "resize"
    config.preprocess.eval_crop = "resize"
    # The size of the patches of Mixer and ViT.
    config.preprocess.permute_patch_size = 4

    config.recipe.loss = "softmax"
    config.optimizer.learning_rate = LEARNING_RATES[family]
    config.optimizer.warmup_steps = config.num_steps // 10
    config.optimizer.decay_type = "cosine"
    config.optimizer.weight_decay = 0.1

    config.checkpoint.every_steps = 500
    config.evals = config_lib.evals(test={"split": "test"})
    return config
