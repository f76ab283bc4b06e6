"""Inputs that once made a parser fail: the name of the target, and the bytes."""

import json
import socket
import struct
import tarfile
from typing import Any

from mixer_jax.suites.workdir import to_json
from tests.helpers.images import png_with_header_size
from tests.helpers.pretrained_files import zip_archive
from tests.helpers.tiny_suite import make_plan

_DEEP = b"[" * 100_000
_NAME_HEADER = b"{'descr': '<U1', 'fortran_order': False, 'shape': (%b)}\n"


def _plan(**changes: Any) -> bytes:
    """Makes the plan of a suite."""
    return json.dumps(to_json(make_plan()) | changes).encode()


def _plan_of_task(**changes: Any) -> bytes:
    """Makes the plan of a suite whose first task has other fields."""
    plan = json.loads(_plan())
    plan["suite"]["tasks"][0] |= changes
    return json.dumps(plan).encode()


def _npy(header: bytes) -> bytes:
    """Makes an .npy file of float32 with any header."""
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header


def _tar_of_claimed_size() -> bytes:
    """Makes an archive whose attributes claim more bytes than there is memory for."""
    info = tarfile.TarInfo("a.png")
    info.type, info.size = b"x", 2**62
    return info.tobuf(tarfile.GNU_FORMAT) + bytes(1024)


CORPUS: list[tuple[str, bytes]] = [
    # An image without pixels was decoded to an array without elements.
    ("images", png_with_header_size(0, 256)),
    ("images", png_with_header_size(2**31, 0)),
    # JSON that nests deeply raised RecursionError.
    *(
        (name, _DEEP)
        for name in (
            "run: config.json",
            "run: metrics.jsonl",
            "run: starts.jsonl",
            "run: bad_images_0.jsonl",
            "suite: plan",
            "suite: result",
            "suite: throughput",
            "comparison: result",
            "checkpoint: checksums",
        )
    ),
    ("run: metrics.jsonl", _DEEP + b"\n"),
    # Values of other types in logs.
    ("run: metrics.jsonl", b'{"step": "1", "loss": 1}\n'),
    ("run: metrics.jsonl", b'{"step": 1, "loss": "low"}\n'),
    ("run: metrics.jsonl", b'{"step": 1, "loss": 1' + b"0" * 400 + b"}\n"),
    ("run: metrics.jsonl", b'{"step": 20, "test/top1": null}\n'),
    ("run: starts.jsonl", b'{"step": 0, "mesh": [], "num_devices": "8"}\n'),
    ("run: bad_images_0.jsonl", b'{"step": "x", "name": 1, "reason": null}\n'),
    ("run: config.json", b'{"early_stopping_patience": 1}'),
    ("run: config.json", b'{"checkpoint": {"best_metric": 1}}'),
    ("run: config.json", b'{"num_steps": "many"}'),
    ("run: config.json", b'{"": 0}'),
    # A metric's name that Matplotlib read as a formula.
    ("run: plots", b'{"step": 1, "$\\\\frac{$/top1": 0.5, "a/top1": 0.5}\n'),
    # The file of a lock with a process id that no system has.
    ("run: lock", f"process {10**20} on {socket.gethostname()}".encode()),
    ("suite: failure", b"\xff\xfe\n"),
    (
        "checkpoint: checksums",
        b'{"algorithm": "crc32", "part_size": 67108864, "files": {"params/a":'
        b' {"size": Infinity, "checksums": [Infinity]}}}',
    ),
    # Files of TFDS's datasets that are damaged, lack splits, or list files that do not exist.
    ("tfds: dataset_info.json", b'{"name": "photos"'),
    ("tfds: dataset_info.json", b'{"name": "photos", "version": "1.0.0"}'),
    (
        "tfds: dataset_info.json",
        b'{"name": "photos", "version": "1.0.0", "fileFormat": "array_record", "splits": ['
        b'{"name": "train", "shardLengths": ["2"], "filepathTemplate": "{DATASET}-{SHARD_INDEX}"}'
        b"]}",
    ),
    (
        "tfds: dataset_info.json",
        b'{"name": "photos", "version": "1.0.0", "fileFormat": "array_record", "splits": ['
        b'{"name": "train", "shardLengths": ["2"], "filepathTemplate": "{DATASET}-{SHARD"}'
        b"]}",
    ),
    ("tfds: undecodable.tsv", b"\xff\n"),
    ("tfds: undecodable.tsv", b"a" * 200_000),
    ("features: request", b'{"model": 1}'),
    # Errors of several lines.
    ("prepare: ImageNet-21k", b"not an archive"),
    ("topologies", b"v5e:\n8"),
    ("overrides", b"--config.model.fa\nly=mixer"),
    ("overrides", b"--config.\rname"),
    ("variations", b"mo\ndel.hidden_dim=8,8"),
    ("comparison: result", b'{"data": "a\\nb", "metrics": {"top1": 1, "num_examples": 9}}'),
    # Numbers of thousands of digits, and ones that take hours to compute.
    ("topologies", b"h100:" + b"9" * 5000),
    ("seeds", b"9" * 5000),
    ("image sizes", b"9" * 5000),
    (
        "overrides",
        b"--config.optimizer.decay_type=staircase\0--config.optimizer.decay_points=1e-999999999",
    ),
    ("overrides", b"--config.profile_steps=1:" + b"9" * 5000),
    ("overrides", b"--config.model.family=vit\0--config.model.hidden_dim=999999999999"),
    ("overrides", b"--config.image_size=99999999999999999999"),
    ("manifest: CSV", b"path,label\na.png," + b"9" * 5000 + b"\nb.png,1\n"),
    ("braces", b"/a/{0..99999999999}.tar"),
    ("braces", b"/a/" + b"{0..99}" * 10 + b".tar"),
    ("braces", b"{d,{e,f}}.tarb,c}/{0." * 9),
    # Plans and results of suites with values of other types.
    ("suite: plan", _plan(image_sizes={})),
    ("suite: plan", _plan(image_sizes={"high": [], "low": 16, "probe": 16})),
    ("suite: plan", _plan_of_task(learning_rates=[])),
    ("suite: plan", _plan_of_task(learning_rates=["0.1"])),
    ("suite: plan", _plan_of_task(extra_evals=True)),
    (
        "suite: throughput",
        b'{"images_per_second": "1", "batch_size": 8, "device": "x", "image_size": [16, 16]}',
    ),
    ("comparison: config", b'{"evals": 1}'),
    (
        "comparison: result",
        b'{"data": "digits test", "metrics": {"top1": 1' + b"0" * 400 + b', "num_examples": 1}}',
    ),
    # Metrics that are not finite, of which no standard deviation can be computed.
    (
        "suite: result",
        b'{"scores": {"test": {"top1": -Infinity, "log_likelihood": -1.0, "num_examples": 100}},'
        b' "seconds": 1.0, "failed": ""}',
    ),
    ("comparison: result", b'{"data": "digits test", "metrics": {"top1": NaN, "num_examples": 9}}'),
    ("run: metrics.jsonl", b'{"step": 20, "test/top1": -Infinity, "test/num_examples": 360}\n'),
    ("run: metrics.jsonl", b'{"step": 20, "test/top1": 1e308, "test/num_examples": 360}\n'),
    # Headers that NumPy cannot parse, and that tarfile cannot read.
    ("features: part", zip_archive("names.npy", _npy(b"{'descr': (\n"))),
    # Names that are not a list, and that are not text.
    ("features: part", zip_archive("names.npy", _npy(_NAME_HEADER % b"") + b"a\0\0\0")),
    ("features: part", zip_archive("names.npy", _npy(_NAME_HEADER % b"1,") + b"\xff" * 4)),
    ("wds: shard", _tar_of_claimed_size()),
    # Names that are not valid Unicode, and with a line break.
    (
        "report of an evaluation",
        b'{"classes": ["a", "\\udfff"], "images": ["\\ud800"], "error": "x"}',
    ),
    ("wds: _info.json", b'{"splits": {"train": {"filenames": ["\\ud800.tar"]}}}'),
    (
        "manifest: JSONL",
        b'{"path": "a\\nb.png", "label": "x"}\n{"path": "a.png", "label": "y"}\n',
    ),
    # An architecture with values of other types.
    (
        "checkpoint: metadata",
        b'{"model_info": {"family": "bit", "variant": "x", "config": {"units": "1", "root_width":'
        b' 8, "root": 0}, "num_classes": 2, "image_size": 32, "class_names": [], "gelu": "tanh",'
        b' "eval_crop": "resize", "exif_orientation": false, "loss": "softmax"}}',
    ),
    (
        "checkpoint: metadata",
        b'{"model_info": {"family": "vit", "variant": "x", "config":'
        b' {"num_blocks": 1, "patch_size": 4, "hidden_dim": 8, "mlp_dim": 8, "num_heads": 0},'
        b' "num_classes": 2, "image_size": 32}}',
    ),
    ("weights: timm's config", b'{"mean": [1' + b"0" * 400 + b", 0, 0]}"),
    # The index of a checkpoint, with values of other types, which orbax does not expect.
    ("checkpoint: all files", b'_CHECKPOINT_METADATA\n{"performance_metrics": 0}'),
    ("checkpoint: all files", b'_CHECKPOINT_METADATA\n{"item_handlers": 0}'),
    # Saved datasets without splits, and with names of classes that are not text.
    ("hf: saved dataset", b'dataset_dict.json\n{"splits": []}'),
    (
        "hf: saved dataset",
        b'train/dataset_info.json\n{"features": {"image": {"_type": "Image"},'
        b' "label": {"names": [1, 2], "_type": "ClassLabel"}}}',
    ),
]
