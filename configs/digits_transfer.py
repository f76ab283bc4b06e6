"""Pre-training on the digits 0-4 alone, to be judged by the `digits` suite on 5-9.

python -m mixer_jax.main --config=configs/digits_transfer.py
python -m mixer_jax.transfer --checkpoint=runs/digits_transfer --suite=digits
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Returns the config."""
    config = config_lib.get_default()
    config.num_steps = 300
    config.batch_size = 64
    config.eval_batch_size = 256
    config.image_size = 8
    config.log_every_steps = 50

    config.model.variant = "custom"
    config.model.num_blocks = 1
    config.model.patch_size = 1
    config.model.hidden_dim = 512
    config.model.tokens_mlp_dim = 64
    config.model.channels_mlp_dim = 128

    config.dataset.name = "digits/low"
    config.preprocess.train_crop = "inception"
    config.preprocess.min_area = 0.1
    config.preprocess.flip = False
    config.preprocess.eval_crop = "whole"

    config.recipe.loss = "softmax"
    config.optimizer.name = "momentum"
    config.optimizer.learning_rate = 0.3
    config.optimizer.warmup_steps = 50
    config.optimizer.decay = "cosine"
    config.optimizer.weight_decay = 1e-3

    config.checkpoint.every_steps = 100
    config.evals = config_lib.evals(test={"split": "test", "every_steps": 100})
    return config
