r"""Fine-tuning on a folder of your own photographs, by the paper's recipe for small datasets.

    python -m mixer_jax.main --config=configs/finetune_folder.py \
        --config.init_from=Mixer-B_16.npz --config.dataset.name=folder:PATH

Expected: Depends on the photographs; not measured.
Data:     PATH has train/ and validation/ (or val/, or test/), each with one directory per class. If
          PATH has the class directories themselves, a tenth of every class is held out.
Weights:  init_from names a workdir, a file or hf:OWNER/NAME and sets the architecture. The default
          is Google's B/16 from ImageNet-21k, downloaded from where it is published.
Size:     `:448` trains on images of 448 px, for which the weights are tiled (Appendix C).
Tuning:   500 steps of 512 images are the paper's choice for 2,000 to 4,000 images (Section 3; arXiv
          2010.11929, B.1.1); for more images train longer, e.g. --config.num_steps=2500. Also try
          learning rates of 0.003, 0.03 and 0.06.
Hardware: On few devices, --config.recipe.grad_accum_steps=8 needs an eighth of the memory.
"""

from ml_collections import ConfigDict

from mixer_jax import config as config_lib
from mixer_jax.errors import UserError

SIZES = ("224", "448")


def get_config(size: str = "224") -> ConfigDict:
    """Builds the config.

    Args:
        size: "224" or "448".
    """
    if size not in SIZES:
        raise UserError(f"argument must be {' or '.join(SIZES)}, got {size!r}.")
    config = config_lib.get_default()
    config.num_steps = 500
    config.batch_size = 512
    config.eval_batch_size = 512
    config.image_size = int(size)
    config.init_from = "gs://mixer_models/imagenet21k/Mixer-B_16.npz"
    config.init_head = "new"
    config.model.variant = "init_from"

    config.dataset.name = "folder:images"
    config.preprocess.train_crop = "random_crop"
    config.preprocess.eval_crop = "square" if size == "448" else "shorter_side"
    config.preprocess.exif_orientation = True

    config.recipe.loss = "softmax"
    config.optimizer.name = "sgd"
    config.optimizer.learning_rate = 0.01
    config.optimizer.warmup_steps = 100
    config.optimizer.decay_type = "cosine"

    config.checkpoint.every_steps = 250
    config.evals = config_lib.evals(validation={"split": "validation", "every_steps": 100})
    return config
