"""The pages of docs/ that plans make, as Markdown: numbers in, text out."""

from collections.abc import Sequence
from typing import Any

from mixer_jax.planning.topology import GIB

_COMMAND = "python -m mixer_jax.plan --tables=docs"
_MB, _MS = 1e6, 1e3


def results_page(rows: Sequence[dict[str, Any]], remat: Sequence[str]) -> str:
    """Returns the page of what pre-training would take.

    Args:
        rows: plans, as JSON holds them.
        remat: policies that are tried where a config file's does not fit.
    """
    lines = [
        "# What pre-training would take",
        "",
        "The real training step of every variant, 224 px, 4,096 images a step, compiled for TPUs",
        f"that were not there (`{_COMMAND}`). Nothing here was",
        "measured on a TPU. The bound is a floor: the longest of arithmetic, memory traffic and",
        "network, each at its peak rate. Core-days are devices × days; a device of v2, v3 or tpu7x",
        "is half a chip. Settings are those of the config file or, where these do not fit, the",
        f"first that do of remat {', '.join(remat)}, then of more pieces a batch.",
        "",
        "| model | topology | chips | remat, pieces, unroll | fits | GiB a device (allowed) | "
        "bound, ms | limit | images/s | MFU at bound | days | core-days | compile, s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *map(_result_line, rows), "", *_made_with(rows)]) + "\n"


def _result_line(row: dict[str, Any]) -> str:
    settings, step, least, run = row["settings"], row["training"], row["bound"], row["cost"]
    fits = "yes" if row["fits"] else "no"
    cells = [
        row["variant"],
        row["topology"],
        f"{row['chips']}",
        f"{settings['remat']}, {settings['accumulation_steps']}, {settings['unroll'] or 'all'}",
        fits,
        f"{_gib(step['needed'])} ({row['allowed_bytes'] / GIB:.1f})",
        *(
            [
                f"{least['seconds'] * _MS:.1f}",
                least["limit"],
                f"{run['images_per_second']:,.0f}",
                f"{run['model_flops_utilization']:.0%}",
                f"{run['days']:.2f}",
                f"{run['core_days']:,.0f}",
            ]
            if least
            else ["–"] * 6
        ),
        f"{step['seconds']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def scaling_page(
    scaling: Sequence[dict[str, float]], images: int, checks: Sequence[dict[str, Any]]
) -> str:
    """Returns the page of weak scaling.

    Args:
        scaling: rows by formula, as `scaling_row` returns them.
        images: a chip.
        checks: compiled rows, as JSON holds them.
    """
    lines = [
        "# Weak scaling, by formula",
        "",
        f"Mixer-L/16 on ImageNet-21k, TPU v5e, {images} images a chip: what a step sends,",
        "and how long that takes at the least beside its arithmetic, both at peak rates. One",
        "float32 all-reduce of all gradients a step. Up to 256 chips are one slice; more are",
        "several, joined by the data-centre network. Not measured on TPUs. Made by",
        f"`{_COMMAND}`.",
        "",
        "| chips | slices | images a step | MB summed | network, ms | arithmetic, ms | "
        "network's share, not overlapped |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in scaling:
        share = row["network"] / (row["network"] + row["arithmetic"])
        lines.append(
            f"| {row['chips']:,.0f} | {row['slices']} | {row['batch']:,.0f} "
            f"| {row['bytes'] / _MB:,.1f} | {row['network'] * _MS:.2f} "
            f"| {row['arithmetic'] * _MS:.2f} | {share:.1%} |"
        )
    lines += [
        "",
        "The formula beside compiled programs, Mixer-S/16 on JFT-300M, bytes a device and step.",
        "Over slices the compiler sums in three legs: scattered within a slice, between slices,",
        "gathered within a slice; the bytes of all three are added.",
        "",
        "| chips | slices | fsdp | gradients, formula | gradients, compiled | parameters, formula "
        "| parameters, compiled | activations, compiled |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for check in checks:
        numbers = [
            check[key]
            for key in (
                "formula",
                "compiled",
                "formula_parameters",
                "compiled_parameters",
                "activations",
            )
        ]
        lines.append(
            f"| {check['chips']} | {check['slices']} | {check['fsdp']} | "
            + " | ".join(f"{number:,.0f}" for number in numbers)
            + " |"
        )
    return "\n".join([*lines, "", *_made_with(checks)]) + "\n"


def _made_with(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Returns which compilers made rows, a line for each."""
    made = {(row["versions"]["jax"], row["versions"]["libtpu"]) for row in rows}
    return [f"Compiled with JAX {jax} and libtpu {libtpu}." for jax, libtpu in sorted(made)]


def _gib(size: float | None) -> str:
    return "?" if size is None else f"{size / GIB:.1f}"
