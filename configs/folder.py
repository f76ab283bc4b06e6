"""Your own folder of images, one directory a class.

python -m mixer_jax.main --config=configs/folder.py --config.dataset.name=folder:PATH
python -m mixer_jax.main --config=configs/folder.py:photos --config.dataset.name=folder:PATH

PATH holds train/ and validation/ (or val/, or test/), and each of these a directory for every
class. Where it holds the directories of the classes itself, a tenth of every class is held out.

The first is for small pictures such as letters and symbols: 32 px, a small Mixer, minutes on a
laptop. Expected, on the digits of configs/digits.py written out as PNG files: 99.4 % top-1 (358 of
360), as with configs/digits.py itself. Measured here.

The second is for photographs: 224 px, Mixer-S/16, an accelerator; its recipe is the paper's for
ImageNet-1k, and it is not measured here. With fewer than 100,000 photographs, start from trained
weights by --config.init_from; below 1,700 or so, its 300 epochs are fewer steps than its warmup,
and --config.optimizer.warmup_steps must be lowered too.
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError

KINDS = ("small", "photos")


def get_config(kind: str = "small") -> ConfigDict:
    """Returns the config; `kind` is "small" or "photos"."""
    if kind not in KINDS:
        raise UserError(f"kind {kind!r} is unknown; choose {' or '.join(KINDS)}")
    config = config_lib.get_default()
    config.dataset.name = "folder:images"
    config.optimizer.weight_decay = 0.1
    if kind == "small":
        config.num_steps = 1_200
        config.batch_size = 128
        config.eval_batch_size = 512
        config.image_size = 32
        config.model.variant = "custom"
        config.model.num_blocks = 4
        config.model.patch_size = 8
        config.model.hidden_dim = 64
        config.model.tokens_mlp_dim = 32
        config.model.channels_mlp_dim = 256
        config.preprocess.train_crop = "random_shift"
        config.preprocess.max_shift = 4
        config.preprocess.flip = False
        config.preprocess.eval_crop = "resize"
        config.recipe.loss = "softmax"
        config.recipe.mixup = 0.2
        config.optimizer.learning_rate = 3e-3
        config.optimizer.warmup_steps = 100
        config.optimizer.decay_type = "cosine"
        config.checkpoint.every_steps = 300
        config.evals = config_lib.evals(validation={"split": "validation", "every_steps": 300})
    else:
        config.num_epochs = 300.0
        config.batch_size = 1024
        config.model.variant = "S/16"
        config.model.stochastic_depth = 0.1
        config.model.head_bias = -6.9
        config.preprocess.randaugment_layers = 2
        config.preprocess.randaugment_magnitude = 15.0
        config.preprocess.exif_orientation = True
        config.recipe.mixup = 0.5
        config.optimizer.warmup_steps = 500
        config.evals = config_lib.evals(validation={"split": "validation", "every_steps": 1_000})
    return config
