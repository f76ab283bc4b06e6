"""Recipes of a small Mixer on few images: augmentation, regularization and optimizers compared.

    python -m mixer_jax.main --config=configs/study_recipes.py:cutmix   # or another key of RECIPES

docs/concepts/recipes.md has the commands and results. All recipes train the same model on the same
6,000 images of Fashion-MNIST for the same number of steps, and differ from "baseline" in the keys
of `RECIPES` only.

Tuning: The learning rate of each optimizer is the best of three or more on `train[90%:]`, seed 0.
        SAM has that of AdamW. Augmentation and regularization have usual strengths, not tuned.
"""

from typing import Any

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError

RECIPES: dict[str, dict[str, Any]] = {
    "baseline": {},
    "no_flip": {"preprocess.flip": False},
    "random_shift": {"preprocess.train_crop": "random_shift", "preprocess.max_shift": 2},
    "random_resized_crop": {
        "preprocess.train_crop": "random_resized_crop",
        "preprocess.min_area": 0.5,
    },
    "randaugment": {
        "preprocess.randaugment_layers": 1,
        "preprocess.randaugment_magnitude": 5.0,
    },
    "random_erasing": {"preprocess.random_erasing": 0.25},
    "mixup": {"recipe.mixup": 0.2},
    "cutmix": {"recipe.cutmix": 1.0},
    "mixup_and_cutmix": {"recipe.mixup": 0.2, "recipe.cutmix": 1.0},
    "label_smoothing": {"recipe.label_smoothing": 0.1},
    "sigmoid_loss": {"recipe.loss": "sigmoid"},
    "dropout": {"model.dropout": 0.1},
    "stochastic_depth": {"model.stochastic_depth": 0.1},
    "ema": {"recipe.ema_decay": 0.99},
    "sgd": {
        "optimizer.name": "sgd",
        "optimizer.learning_rate": 0.3,
        "optimizer.weight_decay": 0.006,
    },
    "lion": {
        "optimizer.name": "lion",
        "optimizer.learning_rate": 0.032,
        "optimizer.weight_decay": 0.6,
        "optimizer.b2": 0.99,
    },
    "lamb": {"optimizer.name": "lamb", "optimizer.learning_rate": 0.02, "optimizer.eps": 1e-6},
    "muon": {
        "optimizer.name": "muon",
        "optimizer.learning_rate": 0.08,
        "optimizer.momentum": 0.95,
    },
    "adafactor": {"optimizer.name": "adafactor", "optimizer.learning_rate": 6e-3},
    "sam": {"optimizer.sam_rho": 0.05},
}


def get_config(recipe: str = "baseline") -> ConfigDict:
    """Builds the config of a recipe."""
    if recipe not in RECIPES:
        raise UserError(f"argument must be one of {', '.join(RECIPES)}, got {recipe!r}.")
    config = config_lib.get_default()
    config.batch_size = 64
    config.eval_batch_size = 1_000
    config.image_size = 28
    config.num_steps = 1_000
    config.log_every_steps = 100

    config.model.variant = "custom"
    config.model.num_blocks = 3
    config.model.patch_size = 4
    config.model.hidden_dim = 48
    config.model.tokens_mlp_dim = 32
    config.model.channels_mlp_dim = 192

    config.dataset.name = "fashion_mnist"
    config.dataset.train_split = "train[:10%]"
    config.dataset.num_classes = 10
    config.preprocess.train_crop = "resize"
    config.preprocess.eval_crop = "resize"

    config.recipe.loss = "softmax"
    config.optimizer.learning_rate = 6e-3
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_type = "cosine"
    config.optimizer.weight_decay = 0.1

    config.checkpoint.every_steps = 500
    config.evals = config_lib.evals(test={"split": "test"})
    config.update_from_flattened_dict(RECIPES[recipe])
    return config
