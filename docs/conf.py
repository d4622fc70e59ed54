import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deltaguard
from deltaguard.chat.conversations import held_out_harmful, held_out_harmless
from deltaguard.chat.openings import OPENING_TOKENS
from deltaguard.cli.presets import PRESETS, read_options
from deltaguard.curvature.store_format import SCHEMA_VERSION as CURVATURE
from deltaguard.reports.records.attacks import AttacksReport
from deltaguard.reports.records.batch import BatchReport
from deltaguard.reports.records.bench import BenchReport
from deltaguard.reports.records.demo import DemoReport
from deltaguard.restoration.acceptance import Rule
from deltaguard.restoration.dial import MOST_LOOKS
from deltaguard.restoration.looks import FIRST
from deltaguard.restoration.options import DEFAULT_MAX_SAFETY_KL, GUARDS, WHOLE_TOKENS
from deltaguard.restoration.tuning import CONVERSATIONS

FORMS = {
    "attacks": AttacksReport,
    "batch": BatchReport,
    "bench": BenchReport,
    "check": deltaguard.CheckReport,
    "demo": DemoReport,
    "evaluation": deltaguard.EvaluationReport,
    "restore": deltaguard.RestoreReport,
    "sweep": deltaguard.SweepReport,
}

project = "deltaguard"
author = "The deltaguard authors"
version = release = deltaguard.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_ext.commands",
    "_ext.docstrings",
    "_ext.mathml",
]
exclude_patterns = ["_build"]

myst_enable_extensions = ["deflist", "dollarmath", "substitution"]
myst_heading_anchors = 3
# Numbers that the program decides are never typed.
myst_substitutions = {
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
    "least_prompts": Rule(limit=0.02, looks=MOST_LOOKS).least_prompts,
    "most_looks": MOST_LOOKS,
    "opening_tokens": OPENING_TOKENS,
    "whole_tokens": WHOLE_TOKENS,
    "num_held_out": deltaguard.CalibrateConfig().num_held_out,
    "num_samples": deltaguard.CalibrateConfig().num_samples,
    "refine_conversations": CONVERSATIONS,
    "schema_curvature": CURVATURE,
    **{f"schema_{name}": form.model_fields["schema_version"].default for name, form in FORMS.items()},
}

# It is in no extra of deltaguard: whoever trains with it has it.
autodoc_mock_imports = ["axolotl"]
# In docstrings, `name` is code.
default_role = "literal"
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"deltaguard {release}"
html_static_path = ["_static"]
html_css_files = ["deltaguard.css"]
html_math_renderer = "mathml"
html_copy_source = False
html_show_copyright = False
html_show_sphinx = False
