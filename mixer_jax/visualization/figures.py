"""Figures without pyplot, which would choose a window system and keep every figure."""

import io
from typing import Any

DPI = 120


def make_figure(width: float, height: float, constrained: bool = False) -> Any:
    """Creates an empty figure, with sizes in inches; `constrained` keeps texts from overlapping."""
    from matplotlib.figure import Figure

    class NotebookFigure(Figure):
        """Figure that notebooks show even if pyplot has not been used yet."""

        def _repr_png_(self) -> bytes:
            return render_figure(self, "png")

    return NotebookFigure(figsize=(width, height), layout="constrained" if constrained else None)


def render_figure(figure: Any, file_format: str) -> bytes:
    """Renders a figure as "png", "jpg", "pdf" or "svg"."""
    import matplotlib

    buffer = io.BytesIO()
    # The same figure is the same SVG: without a date, and with fixed identifiers.
    metadata = {"Date": None} if file_format == "svg" else None
    with matplotlib.rc_context({"svg.hashsalt": "mixer_jax"}):
        figure.savefig(buffer, format=file_format, dpi=DPI, metadata=metadata)
    return buffer.getvalue()
