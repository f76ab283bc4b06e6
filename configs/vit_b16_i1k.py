"""ViT-B/16 on ImageNet-1k: 300 epochs at 224 px (arXiv 2106.10270, or 2010.11929).

    python -m mixer_jax.main --config=configs/vit_b16_i1k.py --workdir=gs://BUCKET/vit_b16_i1k

Paper:    79.67 % ImageNet top-1 (the Mixer paper, Table 3). big_vision reports 79.7 % for this
          recipe.
          `:vit` is the recipe of the ViT paper without AugReg's regularization: 74.79 % at
          224 px (authors), 77.91 % after fine-tuning at 384 px (its Table 5).
Here:     Not reproduced.
Hardware: 0.02k TPU v3 core-days (the Mixer paper, extrapolated).
Recipe:   augreg: augmentation medium2 of AugReg, big_vision's choice for this model. vit: the ViT
          paper, Table 3; loss, head bias and targets are those of Scenic's config.
Data:     imagenet2012 of TFDS.
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
    config.num_epochs = 300.0
    config.model.family = "vit"
    config.model.variant = "B/16"
    config.model.pre_logits = True

    config.dataset.name = "imagenet2012"
    config.dataset.train_split = "train[:99%]"
    config.dataset.num_classes = 1_000
    config.dataset.num_examples = 1_268_355

    config.optimizer.decay_type = "cosine"
    if recipe == "augreg":
        config.model.head_bias = -6.9
        config.preprocess.randaugment_layers = 2
        config.preprocess.randaugment_magnitude = 15.0
        config.recipe.mixup = 0.5
        config.optimizer.learning_rate = 1e-3
        config.optimizer.weight_decay = 0.1
    else:
        config.model.head_bias = -10.0
        config.model.dropout = 0.1
        config.recipe.min_target = 1e-4
        config.optimizer.learning_rate = 3e-3
        config.optimizer.weight_decay = 0.3

    config.evals = config_lib.evals(
        minival={"split": "train[99%:]", "every_steps": 2_000},
        val={"split": "validation", "every_steps": 10_000},
    )
    return config
