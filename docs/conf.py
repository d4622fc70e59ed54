import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import deltaguard

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

myst_enable_extensions = ["deflist", "dollarmath"]
myst_heading_anchors = 3

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
