"""Mixer-L/16 on ImageNet-21k: 300 epochs at 224 px (Section 3, Appendix B).

    python -m mixer_jax.main --config=configs/mixer_l16_i21k.py --workdir=gs://BUCKET/mixer_l16_i21k

Paper:    84.15 % ImageNet top-1 after fine-tuning at 448 px (Table 2),
          82.89 % at 224 px (Table 3).
Here:     Not reproduced.
Hardware: 0.41k TPU v3 core-days (paper, extrapolated); TPU slices: docs/plan_results.md.
Data:     Download ImageNet-21k to DATA_DIR/downloads/manual, then run once
          python -m mixer_jax.prepare imagenet21k --data_dir=DATA_DIR
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
    # Users of the authors' code report -10 for this many classes.
    config.model.head_bias = -10.0

    config.dataset.name = "imagenet21k"
    config.dataset.train_split = "train[:99%]"
    config.dataset.num_classes = 21_843
    config.dataset.num_examples = 14_055_151
    config.preprocess.randaugment_layers = 2
    config.preprocess.randaugment_magnitude = 20.0
    config.recipe.mixup = 0.5
    # Halves the memory of activations without recomputing matmuls or sending gradients twice.
    config.recipe.grad_accum_steps = 2

    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.1

    config.checkpoint.every_steps = 5_000
    config.evals = config_lib.evals(minival={"split": "train[99%:]", "every_steps": 20_000})
    return config
