"""Sphinx's settings for the book, which `python -m minilora.book` builds from the repository's root."""

project = "minilora"
author = "the authors of minilora"
copyright = "Apache-2.0"
html_title = "minilora"

extensions = ["myst_nb", "minilora.book.extension"]
root_doc = "README"
include_patterns = ["README.md", "docs/*.md", "docs/notebook.ipynb", "weights/README.md", "tests/golden/README.md"]

# Markdown as GitHub reads it: ```math is displayed mathematics, and headings have GitHub's anchors.
myst_enable_extensions = ["dollarmath"]
myst_fence_as_directive = {"math"}
myst_heading_anchors = 6
myst_links_external_new_tab = False
nb_execution_mode = "off"  # the notebook is shown with the outputs that it holds
nb_ipywidgets_js = {}  # nothing is loaded from elsewhere

html_theme = "furo"
html_math_renderer = "katex"
html_static_path = ["static", "katex"]
html_css_files = ["katex.min.css", "book.css"]
html_js_files = ["katex.min.js", "book.js", "figures.js"]
html_copy_source = False
html_show_sphinx = False
pygments_style = "friendly"
pygments_dark_style = "monokai"
