"""The few SVG elements that the pictures need, in colours that serve a light and a dark page.

A picture that stands alone follows the reader's colour scheme; one that stands inside a page of the
documentation takes the page's own ink. Marks are tinted by opacity, so they suit both grounds.
"""

from collections.abc import Iterable
from html import escape
from pathlib import Path

STYLE = """
svg.dg { --dg-own-ink: #1f2429; --dg-own-soft: #5c6670; }
@media (prefers-color-scheme: dark) { svg.dg { --dg-own-ink: #e6e9ec; --dg-own-soft: #a3adb7; } }
svg.dg text { font-family: system-ui, "Segoe UI", Helvetica, Arial, sans-serif; }
svg.dg text { fill: var(--color-foreground-primary, var(--dg-own-ink)); font-size: 12px; }
svg.dg .strong { font-weight: 600; }
svg.dg text.soft { fill: var(--color-foreground-secondary, var(--dg-own-soft)); }
svg.dg .edge { fill: none; stroke: var(--color-foreground-secondary, var(--dg-own-soft)); stroke-width: 1; }
svg.dg .line { fill: none; stroke: var(--color-foreground-secondary, var(--dg-own-soft)); stroke-width: 1.5; }
svg.dg .head { fill: var(--color-foreground-secondary, var(--dg-own-soft)); }
svg.dg .bound { fill: none; stroke: var(--color-foreground-primary, var(--dg-own-ink)); stroke-width: 1.6; }
""".strip()


def rect(x: float, y: float, width: float, height: float, *, extra: str) -> str:
    """A rectangle; `extra` holds its other attributes."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" {extra}/>'


def text(x: float, y: float, content: str, *, kind: str = "", anchor: str = "start") -> str:
    """A line of text whose baseline is at y."""
    return f'<text x="{x:g}" y="{y:g}" class="{kind}" text-anchor="{anchor}">{escape(content)}</text>'


def arrow(*points: tuple[float, float]) -> str:
    """A line through the points, its head at the last one; the last stretch is horizontal or vertical."""
    (x0, y0), (x, y) = points[-2:]
    dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
    path = " ".join(f"{px:g},{py:g}" for px, py in (*points[:-1], (x - 5 * dx, y - 5 * dy)))
    across = (4 * dy, 4 * dx)
    corners = ((x, y), *((x - 8 * dx + sign * across[0], y - 8 * dy + sign * across[1]) for sign in (1, -1)))
    head = " ".join(f"{px:g},{py:g}" for px, py in corners)
    return f'<polyline class="line" points="{path}"/><polygon class="head" points="{head}"/>'


def picture(width: float, height: float, elements: Iterable[str], *, title: str, description: str) -> str:
    """A whole SVG file.

    Args:
        width: in pixels, which are the units of all coordinates.
        height: the same.
        elements: in the order of painting.
        title: what the picture is, for readers who do not see it.
        description: what it shows, for the same.

    Returns:
        The file's text.
    """
    head = (
        f'<svg class="dg" xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" style="max-width: 100%; height: auto" role="img">'
    )
    told = f"<title>{escape(title)}</title><desc>{escape(description)}</desc>"
    return "\n".join((head, told, f"<style>{STYLE}</style>", *elements, "</svg>")) + "\n"


def save(picture: str, script: str) -> None:
    """Write a picture next to the script that drew it, under the script's name."""
    Path(script).with_suffix(".svg").write_text(picture, encoding="utf-8")
