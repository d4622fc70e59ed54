"""Tables of a report: what is in them, and how a terminal and Markdown show them. Pages draw them, too."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rich import box
from rich import table as rich_table
from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.text import Text

from deltaguard.reports.records.evaluation import Estimate
from deltaguard.reports.text import DASH, Facts, Measured, code, interval, number, percent, plain, points

T = TypeVar("T")

_WIDTH, _GAP, _NAME = 80, 3, 12
"""Columns of a terminal, those between two of a table, and the fewest of a long name."""


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes:
        title: its head; a line break in it is kept where width is short.
        kind: a `number` stands right and is never broken; a `name` and long `words` stand left.
        code: whether its texts come out of files and are shown as code.
        under: the title of the column below whose texts these stand in a terminal, for want of width.
        sorts: whether the rows of a page can be sorted by it.
    """

    title: str
    kind: Literal["number", "name", "words"] = "number"
    code: bool = False
    under: str = ""
    sorts: bool = True


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: the number in its unit, or words.
        value: what it sorts by, NaN where words stand for a missing number; None where it sorts by its text.
        interval: the bounds of the number's 95 % interval.
        total: how many prompts the number was taken over.
        note: small print.
        tint: the colour of a model, by its name in the pages' style.
    """

    text: str
    value: float | None = None
    interval: str = ""
    total: int | None = None
    note: str = ""
    tint: str = ""

    @property
    def sort_value(self) -> str | None:
        """The number by which a page sorts; empty, which sorts last, where it is missing; None for words."""
        if self.value is None:
            return "" if self.text == DASH else None
        return repr(self.value) if math.isfinite(self.value) else ""


Content = Cell | str | int
"""What a cell may be made of: words, or a count, by which it sorts."""


@dataclass(frozen=True)
class Row:
    """A line of a table; a strong one stands out."""

    cells: tuple[Cell, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """Numbers and words in rows and columns.

    Attributes:
        title: what they are.
        columns: of every row.
        rows: each with a cell a column.
        note: what a reader must know of all of them.
    """

    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    note: str = ""

    @classmethod
    def of(
        cls,
        title: str,
        items: Iterable[T],
        columns: Iterable[tuple[Column | str, Callable[[T], Content]]],
        *,
        note: str = "",
        strong: Callable[[T], bool] = lambda _: False,
    ) -> "Table":
        """Make a table of things: a row each.

        Args:
            title: what the numbers are.
            items: what the rows are of.
            columns: each with what it shows of a thing; a text alone is the title of a column of numbers.
            note: what a reader must know of all of them.
            strong: whether the row of a thing stands out.

        Example:
            >>> columns = ((Column("word", "name"), str), ("letters", len))
            >>> print(Table.of("Words", ["one", "three"], columns).markdown())
            | word | letters |
            | --- | ---: |
            | one | 3 |
            | three | 5 |
        """
        pairs = [(Column(each) if isinstance(each, str) else each, shown) for each, shown in columns]
        rows = tuple(Row(tuple(cell(shown(item)) for _, shown in pairs), strong(item)) for item in items)
        return cls(title, tuple(column for column, _ in pairs), rows, note)

    def terminal(self) -> RenderableType:
        """Draw the table for a terminal of 80 columns: intervals below numbers, no number cut.

        Numbers that have no room beside each other come in further tables, each with the names.
        """
        main = [place for place, column in enumerate(self.columns) if not column.under]
        below = {column.under: place for place, column in enumerate(self.columns) if column.under}
        shown = {place: self._drawn_column(place, below.get(self.columns[place].title)) for place in main}
        parts = [self._drawn(shown, places) for places in self._beside_each_other(shown)]
        if not self.title:
            return Group(*parts)
        title = Text.assemble((self.title, "bold"), f" ({self.note})" if self.note else "")
        spaced = [each for part in parts for each in (Text(), part)]
        return Group(Text(), indented(title), *spaced)

    def _drawn_column(self, place: int, under: int | None) -> list[Text]:
        """Draw a column with the one below it: its head, then a text a row."""
        head = _stacked(self.columns[place].title, "" if under is None else self.columns[under].title)
        cells = ((row.cells[place], "" if under is None else row.cells[under].text) for row in self.rows)
        return [
            head,
            *(_stacked(cell.text, cell.interval if under is None else text) for cell, text in cells),
        ]

    def _beside_each_other(self, shown: Mapping[int, Sequence[Text]]) -> list[list[int]]:
        """Say which columns fit beside each other: all names, and some of the numbers."""
        names = [place for place in shown if self.columns[place].kind != "number"]
        # None behind the last.
        room = _WIDTH + 1 - sum(min(_width(shown[place]), _NAME) + _GAP for place in names)
        parts, left = [list[int]()], room
        for place in shown:
            if place in names:
                continue
            needed = _width(shown[place]) + _GAP
            if needed > left and parts[-1]:
                parts.append([])
                left = room
            parts[-1].append(place)
            left -= needed
        return [sorted((*names, *numbers)) for numbers in parts]

    def _drawn(self, shown: Mapping[int, Sequence[Text]], places: Sequence[int]) -> rich_table.Table:
        drawn = rich_table.Table(box=box.SIMPLE_HEAD, show_edge=False)
        for place in places:
            right = self.columns[place].kind == "number"
            drawn.add_column(
                shown[place][0],
                justify="right" if right else "left",
                no_wrap=right,
                overflow="ellipsis" if right else "fold",
                min_width=None if right else min(_width(shown[place]), _NAME),
            )
        for line, row in enumerate(self.rows, start=1):
            drawn.add_row(*(shown[place][line] for place in places), style="bold" if row.strong else "")
        return drawn

    def markdown(self, *, between: str = " ") -> str:
        """Draw the table as Markdown, without its title; nothing in a name is read as markup.

        Args:
            between: what stands between a number and its interval.
        """
        heads = (" ".join(plain(column.title).split()) for column in self.columns)
        rules = ("---:" if column.kind == "number" else "---" for column in self.columns)
        lines = [heads, rules]
        for row in self.rows:
            pairs = zip(self.columns, row.cells, strict=True)
            lines.append(
                (code(each.text) if column.code and each.text != DASH else plain(each.text))
                + (f"{between}({each.interval})" if each.interval else "")
                for column, each in pairs
            )
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(content: Content) -> Cell:
    """Make a cell of a text, or of a count, which sorts by its value."""
    if isinstance(content, Cell):
        return content
    return Cell(content) if isinstance(content, str) else Cell(str(content), content)


def share(value: float | None) -> Cell:
    """Show a share in percent, a dash where there is none."""
    return Cell(percent(value), value)


def rate(found: Measured | None) -> Cell:
    """Show a measured share with its interval, a dash where there is none.

    A share of which every example gives the same has no interval: "0.0–0.0 %" would look like certainty.
    """
    if found is None:
        return Cell(DASH)
    bounds = interval(found) if found.low < found.high else ""
    return Cell(percent(found.value), found.value, bounds, found.total)


def excess(found: Measured | None, scale: float = 1) -> Cell:
    """Show a difference in points with its interval, a dash where there is none.

    Args:
        found: the difference.
        scale: points in one of its units; 100 where it is a difference of shares.
    """
    if found is None:
        return Cell(DASH)
    bounds = f"{points(scale * found.low)} to {points(scale * found.high)}"
    return Cell(points(scale * found.value), found.value, bounds)


def estimate(found: Estimate | None) -> Cell:
    """Show an estimate in its own unit: percent where it counts prompts, else the number as it is."""
    if found is None or found.interval == "wilson":
        return rate(found)
    # As of a share, an interval without width would look like certainty.
    bounds = f"{number(found.low)} to {number(found.high)}" if found.low < found.high else ""
    return Cell(number(found.value), found.value, bounds, found.total)


def facts_table(title: str, facts: Facts) -> Table:
    """Tabulate labels and texts, for Markdown.

    Args:
        title: of the labels.
        facts: in the order given.
    """
    columns = ((Column(title, "name"), lambda fact: fact[0]), (Column("", "words"), lambda fact: fact[1]))
    return Table.of("", facts, columns)


def facts_grid(facts: Facts) -> RenderableType:
    """Draw labels and texts side by side for a terminal, in the order given."""
    grid = rich_table.Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column(overflow="fold")
    for label, text in facts:
        grid.add_row(label, Text(text))
    return indented(grid)


def indented(content: RenderableType, *, above: int = 0, style: str = "") -> RenderableType:
    """Set a part of a terminal's report in by one column, as tables are."""
    shown = Text(content, style) if isinstance(content, str) else content
    return Padding(shown, (above, 0, 0, 1))


def _width(texts: Sequence[Text]) -> int:
    return max(line.cell_len for text in texts for line in text.split())


def _stacked(above: str, below: str) -> Text:
    return Text.assemble(above, "\n", (below, "dim")) if below else Text(above)
