"""Tables as lines of text and in Markdown."""

from collections.abc import Sequence


def align_columns(lines: Sequence[Sequence[str]]) -> list[str]:
    """Formats a table for a terminal: the first column to the left, the others to the right.

    Args:
        lines: Cells of every line, the header first.
    """
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return [
        "  ".join([name.ljust(widths[0]), *map(str.rjust, rest, widths[1:])])
        for name, *rest in lines
    ]


def markdown_lines(lines: Sequence[Sequence[str]]) -> list[str]:
    """Formats a table in Markdown; the first line is the header."""
    header, *cells = lines
    lines = [header, ["---"] * len(header), *cells]
    # An unescaped bar would end the cell.
    lines = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return [f"| {' | '.join(line)} |" for line in lines]


def drop_empty_columns(rows: Sequence[dict[str, str]]) -> list[list[str]]:
    """Returns header and cells of rows with the same columns, without columns that are empty."""
    columns = [column for column in rows[0] if any(row[column] for row in rows)]
    return [columns, *([row[column] for column in columns] for row in rows)]
