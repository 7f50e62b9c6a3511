"""Sphinx configuration. `make docs` builds the site into docs/_build/html; it loads nothing from other servers."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

from generated_pages import write_pages  # noqa: E402  (found through the path above)

from vqmosaic import __version__  # noqa: E402

project = "vqmosaic"
author = "the vqmosaic authors"
copyright = author
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
exclude_patterns = ["_build"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
nitpicky = False

html_theme = "furo"
html_title = f"vqmosaic {__version__}"

write_pages(ROOT / "docs")
