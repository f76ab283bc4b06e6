"""Mixer-L/16 on ImageNet-1k: 300 epochs at 224 px (Section 3, Appendix B).

    python -m mixer_jax.main --config=configs/mixer_l16_i1k.py --workdir=gs://BUCKET/mixer_l16_i1k

Paper:    71.76 % ImageNet top-1 (Table 3).
Here:     Not reproduced.
Hardware: 0.04k TPU v3 core-days (paper, extrapolated).
Data:     imagenet2012 of TFDS.
          Without data, to try or time the config: --config.dataset.name=synthetic
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 300.0
    config.model.variant = "L/16"
    config.model.stochastic_depth = 0.1
    config.model.head_bias = -6.9

    config.dataset.name = "imagenet2012"
    config.dataset.train_split = "train[:99%]"
    config.dataset.num_classes = 1_000
    config.dataset.num_examples = 1_268_355
    config.preprocess.randaugment_layers = 2
    config.preprocess.randaugment_magnitude = 15.0
    config.recipe.mixup = 0.5
    # Halves the memory of activations without recomputing matmuls or sending gradients twice.
    config.recipe.grad_accum_steps = 2

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1

    config.evals = config_lib.evals(
        minival={"split": "train[99%:]", "every_steps": 2_000},
        val={"split": "validation", "every_steps": 10_000},
    )
    return config
