"""What `greedy` does to one layer, drawn from a real solution: `python -m docs.figures.one_layer`.

The layer is small and made up (fixed seed, float64); the arithmetic is deltaguard's own.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from docs.figures.svg import picture, rect, save, text
from torch import Tensor

from deltaguard.solvers import Factor, Solution, factorise, greedy_factored

ROWS, COLUMNS, TOKENS = 8, 12, 400
SEED, STRENGTH = 0, 0.25

CELL, GAP, LEFT, TOP = 11, 19, 2, 28
PANEL = COLUMNS * CELL
KEPT, UP, DOWN, COST = "#1a9e6b", "#d9621c", "#2f7fd6", "#9a5bd0"


@dataclass(frozen=True)
class Layer:
    """A layer's delta and its curvature, factorised."""

    delta: Tensor
    factor: Factor


def make_layer() -> Layer:
    """Inputs with five common directions and columns of different size; a delta of rank two with noise."""
    draw = torch.Generator().manual_seed(SEED)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    mixing = normal(COLUMNS, 5)
    size = torch.logspace(-0.4, 0.5, COLUMNS, dtype=torch.float64)[torch.randperm(COLUMNS, generator=draw)]
    inputs = (normal(TOKENS, 5) @ mixing.T + 0.5 * normal(TOKENS, COLUMNS)) * size
    delta = normal(ROWS, 2) @ normal(2, COLUMNS) + 0.5 * normal(ROWS, COLUMNS)
    return Layer(delta, factorise(inputs.T @ inputs / TOKENS))


def draw() -> str:
    """The picture: five heat maps, columns ordered from cheapest to dearest."""
    layer = make_layer()
    zero = torch.zeros_like(layer.delta)
    joint = greedy_factored(zero, layer.delta, layer.factor, strength=STRENGTH)
    alone = greedy_factored(zero, layer.delta, layer.factor, strength=STRENGTH, compensation="none")
    order = layer.factor.order.flip(0)
    delta, restored, kept = (m[:, order] for m in (layer.delta, joint.weight, alone.weight))
    cost = delta.square() / (2 * layer.factor.inverse_diagonal[order])
    chosen = (kept != 0).double()
    scale = float(delta.abs().max())
    panels = (
        _panel(0, "1  Delta Δ", "safety cost 100 %", _tint(delta, scale), _signed),
        _panel(1, "2  Cost of entries", "cheapest → dearest", _tint(cost, float(cost.max())), _costly),
        _panel(2, "3  Kept entries", f"safety cost {_percent(alone)}", chosen, _chosen),
        _panel(3, "4  Compensation", "on the others", _tint(restored - kept, scale), _signed),
        _panel(4, "5  Restored delta", f"safety cost {_percent(joint)}", _tint(restored, scale), _signed),
    )
    bounds = [_boundary(number, chosen) for number in (2, 3, 4)]
    return picture(
        LEFT + 5 * PANEL + 4 * GAP + 2,
        TOP + ROWS * CELL + 26,
        [*panels, *bounds],
        title="What deltaguard does to one layer",
        description=_description(alone, joint),
    )


def _tint(values: Tensor, largest: float) -> Tensor:
    """The square root of the size, with the sign, so that small entries can still be seen."""
    return values.sign() * (values.abs() / largest).sqrt()


def _description(alone: Solution, joint: Solution) -> str:
    kept = alone.kept_entries or 0.0
    return (
        f"Five heat maps of a layer with {ROWS} rows and {COLUMNS} columns, the columns ordered from "
        "cheapest to dearest: the delta; the safety cost of each entry; the entries that are kept, whole "
        f"columns from the left and part of one boundary column, {100 * kept:.0f} % of all; "
        "the compensation on the entries that are not kept; and their sum, the restored delta. Keeping alone "
        f"leaves {_percent(alone)} of the safety cost; compensation brings it down to {_percent(joint)}. "
        "The tint grows with the square root of an entry's size."
    )


def _panel(number: int, title: str, below: str, values: Tensor, colour: Callable[[float], str]) -> str:
    x = _left(number)
    cells = [
        rect(
            x + column * CELL, TOP + row * CELL, CELL - 1, CELL - 1, extra=colour(float(values[row, column]))
        )
        for row in range(ROWS)
        for column in range(COLUMNS)
    ]
    frame = rect(x - 1, TOP - 1, PANEL + 1, ROWS * CELL + 1, extra='class="edge"')
    heading = text(x - 1, TOP - 12, title, kind="strong")
    return "\n".join((heading, frame, *cells, text(x - 1, TOP + ROWS * CELL + 18, below, kind="soft")))


def _boundary(number: int, chosen: Tensor) -> str:
    """The line between what is kept and what is not; kept entries of a row are its first ones."""
    x, y = _left(number) - 0.5, TOP - 0.5
    points: list[str] = []
    for row, count in enumerate(chosen.sum(1).tolist()):
        points += [f"{x + count * CELL:g},{y + (row + end) * CELL:g}" for end in (0, 1)]
    return f'<polyline class="bound" points="{" ".join(points)}"/>'


def _left(number: int) -> float:
    return LEFT + number * (PANEL + GAP)


def _percent(solution: Solution) -> str:
    return f"{100 * solution.safety_cost:.1f} %"


def _signed(value: float) -> str:
    return f'fill="{UP if value > 0 else DOWN}" fill-opacity="{abs(value):.2f}"'


def _costly(value: float) -> str:
    return f'fill="{COST}" fill-opacity="{value:.2f}"'


def _chosen(value: float) -> str:
    return f'fill="{KEPT}" fill-opacity="{0.85 * value:.2f}"'


if __name__ == "__main__":
    save(draw(), __file__)
