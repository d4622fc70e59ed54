"""The packages, how they import, and the way of the data: `python -m docs.figures.architecture`."""

from docs.figures.svg import arrow, picture, rect, save, text

PROCESS, ARTIFACT = "#2f7fd6", "#1a9e6b"

LAYERS = (
    (("cli/", "one file per verb; prints"),),
    (("integrations/", "in trainers"), ("service/", "jobs, page"), ("studies/", "demo, bench")),
    (("restoration/", "plan, trial, dial, write"),),
    (("evaluation/", "suites, judges, intervals"),),
    (("finetuning/", "data, training"), ("methods/", "a file each")),
    (("curvature/", "calibration, the store"),),
    (("chat/", "templates, batches, answers"),),
    (("models/", "read, write, adapt"), ("solvers/", "torch only")),
    (("reports/", "records, tables, pages"),),
)
WIDTH, HEIGHT = 740, 560
STACK, STEP, BOX = 308, 56, 40
LEFT, SIDE = 334, 180


def draw() -> str:
    """The picture: imports on the left, data on the right."""
    return picture(
        WIDTH,
        HEIGHT,
        [*_imports(), *_data()],
        title="How deltaguard is built",
        description=(
            "Left: the rooms from cli over integrations, service and studies, restoration, evaluation and "
            "finetuning, methods, curvature and chat down to models and solvers, and reports; a room imports "
            "from those below. "
            "Right: the aligned checkpoint and the safety conversations go through calibration into the "
            "CurvatureStore; the store, the aligned and the fine-tuned checkpoint go through restoration "
            "into the restored checkpoint and its report, from which terminal, HTML and model card are "
            "drawn."
        ),
    )


def _imports() -> list[str]:
    elements = [text(2, 14, "Imports point down", kind="strong")]
    for number, layer in enumerate(LAYERS):
        top = 30 + number * STEP
        width = (STACK - 10 * (len(layer) - 1)) / len(layer)
        for place, (name, what) in enumerate(layer):
            left = 2 + place * (width + 10)
            box = _one_line if len(layer) == 1 else _two_lines
            elements.append(box(left, top, width, name, what, PROCESS))
        if number:
            elements.append(arrow((2 + STACK / 2, top - STEP + BOX), (2 + STACK / 2, top)))
    below = 30 + len(LAYERS) * STEP
    return [
        *elements,
        text(
            2,
            below + 6,
            "Single files: device.py by what is above models, all others anywhere.",
            kind="soft",
        ),
    ]


def _data() -> list[str]:
    middle, right, between = LEFT + SIDE / 2, WIDTH - 2 - SIDE / 2, LEFT + SIDE + 22
    other = WIDTH - 2 - SIDE
    return [
        text(LEFT, 14, "Data goes one way", kind="strong"),
        _two_lines(LEFT, 30, SIDE, "safety conversations", "prompts, own refusals", ARTIFACT),
        _two_lines(other, 30, SIDE, "aligned checkpoint", "folder or Hub id", ARTIFACT),
        arrow((middle, 70), (middle, 108)),
        arrow((between, 128), (LEFT + SIDE, 128)),
        _two_lines(LEFT, 108, SIDE, "curvature/", "once per aligned model", PROCESS),
        arrow((middle, 148), (middle, 186)),
        _two_lines(LEFT, 186, SIDE, "CurvatureStore", "H, G, held-out talks", ARTIFACT),
        _two_lines(other, 186, SIDE, "fine-tuned checkpoint", "or a LoRA adapter", ARTIFACT),
        arrow((middle, 226), (middle, 272)),
        arrow((other, 50), (between, 50), (between, 272)),
        arrow((right, 226), (right, 272)),
        _two_lines(LEFT, 272, WIDTH - 2 - LEFT, "restoration/", "plan → trial → dial → writer", PROCESS),
        arrow((middle, 312), (middle, 354)),
        arrow((right, 312), (right, 354)),
        _two_lines(LEFT, 354, SIDE, "restored checkpoint", "mirrors the fine-tuned one", ARTIFACT),
        _two_lines(other, 354, SIDE, "report", "deltaguard_report.json", ARTIFACT),
        arrow((right, 394), (right, 420)),
        text(WIDTH - 2, 438, "reports/: terminal, HTML, model card", anchor="end"),
    ]


def _one_line(x: float, y: float, width: float, name: str, what: str, colour: str) -> str:
    return "\n".join(
        (
            _frame(x, y, width, colour),
            text(x + 12, y + 25, name, kind="strong"),
            text(x + width - 12, y + 25, what, kind="soft", anchor="end"),
        )
    )


def _two_lines(x: float, y: float, width: float, name: str, what: str, colour: str) -> str:
    middle = x + width / 2
    return "\n".join(
        (
            _frame(x, y, width, colour),
            text(middle, y + 17, name, kind="strong", anchor="middle"),
            text(middle, y + 33, what, kind="soft", anchor="middle"),
        )
    )


def _frame(x: float, y: float, width: float, colour: str) -> str:
    round_corners = 'rx="6"' if colour == PROCESS else 'rx="20"'
    return rect(
        x, y, width, BOX, extra=f'{round_corners} fill="{colour}" fill-opacity="0.14" stroke="{colour}"'
    )


if __name__ == "__main__":
    save(draw(), __file__)
