"""Results as tables for people."""

from collections.abc import Callable
from typing import Any

# Heading, key of a row, and how its value is written.
Column = tuple[str, str, Callable[[Any], str]]

_COLUMNS: list[Column] = [
    ("images/s", "images_per_second", "{:.2f}".format),
    ("ms/step", "step_seconds", lambda v: f"{1000 * v:.1f}"),
    ("ms/image alone", "latency_seconds", lambda v: f"{1000 * v:.2f}"),
    ("MFU %", "utilisation", lambda v: f"{100 * v:.1f}"),
    ("memory GiB", "memory_bytes", lambda v: f"{v / 2**30:.2f}"),
    ("compile s", "compile_seconds", "{:.1f}".format),
    ("first step s", "first_step_seconds", "{:.1f}".format),
    ("ours to this", "ratio", "{:.2f}".format),
]

_COMPILE_COLUMNS: list[Column] = [
    ("compile s", "compile_seconds", "{:.2f}".format),
    ("first step s", "first_step_seconds", "{:.2f}".format),
    ("from the cache s", "cached_first_step_seconds", "{:.2f}".format),
    ("memory GiB", "memory_bytes", lambda v: f"{v / 2**30:.2f}"),
    ("images/s", "images_per_second", "{:.2f}".format),
    ("ours to this", "ratio", "{:.2f}".format),
]


def print_comparisons(report: dict[str, Any]) -> None:
    """Prints what `--mode=train,infer` measured."""
    print(_versions(report))
    for mode in report["modes"]:
        rates = [
            f"{name} {rate / 1e9:,.0f}" for name, rate in mode["product_flops_per_second"].items()
        ]
        print(f"\n{mode['mode']}: {_work(mode)}")
        print(f"GFLOP/s of a bare matrix product: {', '.join(rates)}")
        if mode["apart"]:
            print(f"memory was short: started anew in every round: {', '.join(mode['apart'])}")
        print_rows(mode["contestants"], _COLUMNS)


def print_compilations(report: dict[str, Any]) -> None:
    """Prints what `--mode=compile` measured."""
    print(_versions(report))
    print(f"\ncompile the training step: {_work(report)}")
    print_rows(report["contestants"], _COMPILE_COLUMNS)


def _versions(report: dict[str, Any]) -> str:
    names = ("device", "topology", "jax", "flax", "libtpu", "torch", "timm")
    return ", ".join(f"{name} {report[name]}" for name in names if name in report)


def _work(report: dict[str, Any]) -> str:
    return (
        f"Mixer-{report['variant']}, {report['image_size']} px, "
        f"{report['batch_size']} images a step, {report['dtype']}"
    )


def print_rows(rows: list[dict[str, Any]], columns: list[Column]) -> None:
    """Prints a line for each row; a column that no row has is left out, "-" stands for none."""
    shown = [c for c in columns if any(row.get(c[1]) is not None for row in rows)]
    width = max(len(row["name"]) for row in rows)
    print(" " * width + "".join(f"  {heading}" for heading, _, _ in shown))
    for row in rows:
        if row["failed"]:
            print(f"{row['name']:{width}}  failed: {row['failed']}")
            continue
        cells = ["-" if row[key] is None else write(row[key]) for _, key, write in shown]
        padded = [f"  {cell:>{len(shown[i][0])}}" for i, cell in enumerate(cells)]
        print(f"{row['name']:{width}}" + "".join(padded))
