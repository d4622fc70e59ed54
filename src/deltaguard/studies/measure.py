"""How the models of a bench are asked and judged: by `evaluation.measure`, as in an evaluation."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from deltaguard.device import find_device
from deltaguard.evaluation.exchange import Question
from deltaguard.evaluation.results import Result
from deltaguard.evaluation.suites.parts import Part
from deltaguard.studies.mixing import with_secret


def with_secret_before(parts: Sequence[Part], secret: str) -> tuple[Part, ...]:
    """Put a secret before the system prompt of every question; an empty one changes nothing."""
    if not secret:
        return tuple(parts)

    def asked(part: Part) -> tuple[Question, ...]:
        return tuple(replace(each, system=with_secret(each.system, secret)) for each in part.questions)

    return tuple(replace(part, questions=asked(part)) for part in parts)


def letters(result: Result) -> str:
    """Write the class of each answer as its first letter: refused, complied or incoherent."""
    return "".join(str(each)[0] for each in result.judged["opening"].classes)


def numbers(result: Result) -> tuple[float, ...]:
    """List the one number that a part without judges measures on each question."""
    (values,) = result.values.values()
    return tuple(value for value in values if value is not None)


def device() -> str:
    """Find where models of a bench run."""
    return str(find_device())


def device_name() -> str:
    """Name the device that models of a bench run on, a GPU by its model.

    Example:
        ```python
        device_name()  # "cpu", or "cuda (NVIDIA H100 80GB HBM3)"
        ```
    """
    return f"cuda ({torch.cuda.get_device_name()})" if device() == "cuda" else "cpu"
