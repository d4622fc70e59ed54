import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from deltaguard import __version__

project = "deltaguard"
author = "The deltaguard authors"
copyright = author  # noqa: A001
version = release = __version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "_ext.commands",
    "_ext.docstrings",
    "_ext.mathml",
]
exclude_patterns = ["_build", "README.md"]

myst_enable_extensions = ["attrs_block", "deflist", "dollarmath", "smartquotes"]
myst_heading_anchors = 3

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
html_show_sourcelink = False
html_show_copyright = False
