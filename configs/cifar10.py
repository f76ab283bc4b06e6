"""CIFAR-10 from scratch, with a small Mixer at 32 px.

    python -m mixer_jax.prepare cifar10
    python -m mixer_jax.main --config=configs/cifar10.py

Here:     Not measured.
Public:   https://github.com/omihub777/MLP-Mixer-CIFAR reports 90.83 % top-1 after 300 epochs of
          128 images, for a Mixer with the dimensions of this config (1.13 million parameters; that
          page says 0.67). Its recipe has the same peak learning rate, but AutoAugment and CutMix,
          where this one has mixup and stochastic depth.
Tuning:   Nothing has been tuned. Choose hyperparameters with
          --config.dataset.train_split=train[:90%] --config.evals.test.split=train[90%:].
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib


def get_config() -> ConfigDict:
    """Builds the config."""
    config = config_lib.get_default()
    config.num_epochs = 300.0
    config.batch_size = 128
    config.eval_batch_size = 1_000
    config.image_size = 32

    config.model.variant = "custom"
    config.model.num_blocks = 8
    config.model.patch_size = 4
    config.model.hidden_dim = 128
    config.model.tokens_mlp_dim = 64
    config.model.channels_mlp_dim = 512
    config.model.stochastic_depth = 0.1

    config.dataset.name = "cifar10"
    config.dataset.num_classes = 10
    config.dataset.num_examples = 50_000
    config.preprocess.train_crop = "random_shift"
    config.preprocess.max_shift = 4
    config.preprocess.eval_crop = "resize"

    config.recipe.loss = "softmax"
    config.recipe.mixup = 0.5
    config.optimizer.learning_rate = 1e-3
    config.optimizer.warmup_steps = 2_000
    config.optimizer.decay_type = "cosine"
    config.optimizer.weight_decay = 0.1

    config.evals = config_lib.evals(test={"split": "test", "every_steps": 5_000})
    return config
