"""ViT-L/16 on ImageNet-21k: 300 or 90 epochs at 224 px (arXiv 2106.10270, or 2010.11929).

    python -m mixer_jax.main --config=configs/vit_l16_i21k.py --workdir=gs://BUCKET/vit_l16_i21k

Paper:    84.46 % ImageNet top-1 after fine-tuning (the Mixer paper, Table 3).
          `:vit` is the recipe of the ViT paper and of its weights:
          85.30 % after fine-tuning at 512 px (its Table 2),
          49.90 % on held-out images of ImageNet-21k (authors).
Here:     Not reproduced.
Hardware: 0.55k TPU v3 core-days (the Mixer paper, extrapolated); 0.18k for `:vit`.
Recipe:   augreg: 300 epochs, augmentation medium2 of AugReg, big_vision's choice for this model,
          with a class token as in the published weights. vit: 90 epochs, the ViT paper, Table 3,
          with the final learning rate, hidden head layer and head bias of the published weights.
Data:     Download ImageNet-21k to DATA_DIR/downloads/manual, then run once
          python -m mixer_jax.prepare imagenet21k --data_dir=DATA_DIR
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError

RECIPES = ("augreg", "vit")


def get_config(recipe: str = "augreg") -> ConfigDict:
    """Builds the config.

    Args:
        recipe: "augreg" or "vit".
    """
    if recipe not in RECIPES:
        raise UserError(f"argument must be {' or '.join(RECIPES)}, got {recipe!r}.")
    config = config_lib.get_default()
    config.model.family = "vit"
    config.model.variant = "L/16"
    config.model.head_bias = -10.0

    config.dataset.name = "imagenet21k"
    config.dataset.train_split = "train[:99%]"
    config.dataset.num_classes = 21_843
    config.dataset.num_examples = 14_055_151
    # Halves the memory of activations without recomputing matmuls or sending gradients twice.
    config.recipe.grad_accum_steps = 2

    config.optimizer.learning_rate = 1e-3
    if recipe == "augreg":
        config.num_epochs = 300.0
        config.preprocess.randaugment_layers = 2
        config.preprocess.randaugment_magnitude = 15.0
        config.recipe.mixup = 0.5
        config.optimizer.weight_decay = 0.1
        config.optimizer.decay_type = "cosine"
    else:
        config.num_epochs = 90.0
        config.model.pre_logits = True
        config.model.dropout = 0.1
        config.optimizer.weight_decay = 0.03
        config.optimizer.end_learning_rate = 1e-5
        # The paper clips gradients on ImageNet-1k only.
        config.optimizer.clip_norm = 0.0

    config.checkpoint.every_steps = 5_000
    config.evals = config_lib.evals(minival={"split": "train[99%:]", "every_steps": 20_000})
    return config
