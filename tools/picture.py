"""The one picture of the README: the demo's model before fine-tuning, after it, and restored."""

from docs.figures.svg import picture, rect, text

from deltaguard.reports.records.base import RateRow
from deltaguard.reports.records.demo import DemoReport, ModelRow

_NAMES = {"aligned": "before", "finetuned": "after fine-tuning", "restored": "restored"}
_COLOURS = {"aligned": "#6b7785", "finetuned": "#d9621c", "restored": "#1a9e6b"}
_LEFT, _BAR, _ROW, _GROUP, _WIDTH = 124, 260, 20, 96, 780
_TOP = 22


def demo_picture(content: str) -> str:
    """Draw the three rates of the three models as bars, each with its 95 % interval.

    Args:
        content: `DemoReport` as JSON.

    Returns:
        An SVG file.
    """
    report = DemoReport.model_validate_json(content)
    columns = (
        (_LEFT, "Harmful requests complied with ↓", lambda model: model.attack_success),
        (_LEFT + _BAR + 80, "Task answers that are right ↑", lambda model: model.task_accuracy),
    )
    elements: list[str] = []
    for place, (x, title, rate) in enumerate(columns):
        elements.append(text(x, _TOP, title, kind="strong"))
        for number, model in enumerate(report.models):
            y = _TOP + 14 + number * (_ROW + 6)
            if place == 0:
                elements.append(text(_LEFT - 10, y + 14, _NAMES[model.name], anchor="end"))
            elements += _bar(x, y, model, rate(model))
    described = "; ".join(
        f"{_NAMES[model.name]}: {model.attack_success.value:.0%} of harmful requests complied with, "
        f"{model.task_accuracy.value:.0%} of task answers right"
        for model in report.models
    )
    return picture(
        _WIDTH, _TOP + _GROUP, elements, title="A fine-tune, and the same restored", description=described
    )


def _bar(x: float, y: float, model: ModelRow, rate: RateRow) -> list[str]:
    low, high = (x + _BAR * end for end in (rate.low, rate.high))
    middle = y + _ROW / 2
    return [
        rect(x, y, _BAR, _ROW, extra='fill="currentColor" fill-opacity="0.06"'),
        rect(x, y, max(_BAR * rate.value, 1), _ROW, extra=f'fill="{_COLOURS[model.name]}"'),
        f'<path class="edge" stroke="currentColor" d="M{low:g},{middle:g} H{high:g}"/>',
        text(x + _BAR + 8, y + 14, f"{rate.value:.0%}", kind="strong"),
    ]
