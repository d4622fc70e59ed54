"""Numbers that the program decides, for the pages that say them: never typed."""

import re
from collections.abc import Mapping
from functools import cache

import deltaguard
from deltaguard.chat.conversations import held_out_harmful, held_out_harmless
from deltaguard.chat.refusals import OPENING_TOKENS
from deltaguard.cli.presets import PRESETS, read_options
from deltaguard.curvature.leaning import RANK
from deltaguard.curvature.store_format import SCHEMA_VERSION as CURVATURE
from deltaguard.reports.records.attacks import AttacksReport
from deltaguard.reports.records.batch import BatchReport
from deltaguard.reports.records.bench import BenchReport
from deltaguard.reports.records.demo import DemoReport
from deltaguard.restoration.acceptance import MOST_LOOKS, Rule
from deltaguard.restoration.looks import FIRST
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, GUARDS, WHOLE_TOKENS
from deltaguard.restoration.tuning import CONVERSATIONS

_FORMS = {
    "attacks": AttacksReport,
    "batch": BatchReport,
    "bench": BenchReport,
    "check": deltaguard.CheckReport,
    "demo": DemoReport,
    "evaluation": deltaguard.EvaluationReport,
    "restore": deltaguard.RestoreReport,
    "sweep": deltaguard.SweepReport,
}
_PLACE = re.compile(r"<!-- value (\w+) -->([^\n]*?)<!-- /value -->")
_MARKER = re.compile(r"<!-- /?value\b")


@cache
def values() -> Mapping[str, str]:
    """Find every value by the name that pages call it."""
    calibration = deltaguard.CalibrateConfig()
    found: dict[str, str | int | float] = {
        **{f"{name}_safety_kl": f"{read_options(name)['max_safety_kl']:g}" for name in PRESETS},
        "default_max_safety_kl": f"{DEFAULT_MAX_SAFETY_KL:g}",
        "default_strength": deltaguard.RestoreConfig(method="greedy").chosen_strength,
        "first_looks": FIRST,
        "guard_trusted": f"{GUARDS['trusted']:g}",
        "guard_unknown": f"{GUARDS['unknown']:g}",
        "held_out_categories": len({row.category for row in held_out_harmful()}),
        "held_out_all": len(held_out_harmful()) + len(held_out_harmless()),
        "held_out_harmful": len(held_out_harmful()),
        "held_out_harmless": len(held_out_harmless()),
        "leaning_rank": RANK,
        "least_prompts": Rule(limit=0.02, looks=MOST_LOOKS).least_prompts,
        "most_looks": MOST_LOOKS,
        "opening_tokens": OPENING_TOKENS,
        "whole_tokens": WHOLE_TOKENS,
        "num_held_out": calibration.num_held_out,
        "num_samples": calibration.num_samples,
        "refine_conversations": CONVERSATIONS,
        "schema_curvature": CURVATURE,
        **{f"schema_{name}": form.model_fields["schema_version"].default for name, form in _FORMS.items()},
    }
    return {name: str(value) for name, value in found.items()}


def fill_values(page: str) -> str:
    """Give a page with every value between `<!-- value NAME -->` and `<!-- /value -->` written anew.

    Args:
        page: the page's text.

    Raises:
        ValueError: a marker has no counterpart on its line, names no value, or begins a line, where Markdown
            takes all of the line for HTML.
    """
    known, places = values(), list(_PLACE.finditer(page))
    if 2 * len(places) != len(_MARKER.findall(page)):
        raise ValueError("a value stands between <!-- value NAME --> and <!-- /value --> on one line")
    if unknown := sorted({place[1] for place in places} - known.keys()):
        raise ValueError(f"no value is called {', '.join(unknown)}; there are {', '.join(known)}")
    if re.search(r"(?m)^\s*<!-- value", page):
        raise ValueError("a value must not begin a line, where Markdown takes all of it for HTML")
    return _PLACE.sub(lambda place: f"<!-- value {place[1]} -->{known[place[1]]}<!-- /value -->", page)
