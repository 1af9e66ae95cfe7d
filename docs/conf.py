"""Sphinx configuration: python -m sphinx -W docs out/docs."""

import importlib.metadata

project = "prifu_plugin"
author = "The prifu_plugin authors"
release = importlib.metadata.version("prifu_plugin")
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
html_theme = "furo"
html_title = f"prifu_plugin {release}"
autodoc_typehints = "description"
autodoc_member_order = "bysource"
napoleon_use_ivar = True
exclude_patterns = ["results"]
