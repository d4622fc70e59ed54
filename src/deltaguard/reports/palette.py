"""Colours, shapes and dashes that tell things apart, on light and dark ground, without relying on hue.

Every colour has a contrast of at least 4.5 to the grounds of the pages, so it serves text, too. The first
three are those of the aligned, the fine-tuned and the restored model.
"""

from collections.abc import Sequence

LIGHT = (
    "#0067a5",
    "#b8420a",
    "#0a7454",
    "#7b3fa8",
    "#7a5c00",
    "#b81f68",
    "#006f82",
    "#59616e",
    "#7d1d2c",
    "#1b1f26",
)
DARK = (
    "#6cb6f0",
    "#ff9a62",
    "#4fd0a0",
    "#c9a2f2",
    "#e0c04a",
    "#ff8fc0",
    "#5fd6e6",
    "#a9b1be",
    "#ef8a8a",
    "#f0f2f5",
)
SHAPES = ("circle", "square", "triangle-up", "diamond", "cross", "triangle-down", "triangle-right")
DASHES: tuple[Sequence[int], ...] = ((1, 0), (6, 3), (2, 2))
"""Of lines: lengths of strokes and gaps. Shapes and dashes repeat at other steps than colours do."""


def colour(place: int) -> str:
    """Name the colour of the thing at a place, for a page that holds `palette_css`.

    Example:
        >>> colour(0), colour(10)
        ('var(--c0, #0067a5)', 'var(--c0, #0067a5)')
    """
    number = place % len(LIGHT)
    return f"var(--c{number}, {LIGHT[number]})"


def shape(place: int) -> str:
    """Name the shape of a point at a place, as Vega does."""
    return SHAPES[place % len(SHAPES)]


def dash(place: int) -> list[int]:
    """Choose the dashes of a line at a place."""
    return list(DASHES[place % len(DASHES)])


def palette_css(selector: str) -> str:
    """Rules that define the colours for light and dark.

    Args:
        selector: whose properties they become, such as `:root`.
    """
    light, dark = (
        " ".join(f"--c{number}: {value};" for number, value in enumerate(colours))
        for colours in (LIGHT, DARK)
    )
    return f"{selector} {{ {light} }}\n@media (prefers-color-scheme: dark) {{ {selector} {{ {dark} }} }}"
