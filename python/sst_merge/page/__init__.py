"""Reports as pages: one HTML file each, that loads nothing, for people who decide by it.

`of_merge` and `of_comparison` say what stands on a page, as a `model.Page`; `render` makes the file, by one template.
"""

from .model import Page
from .of_comparison import page_of_comparison
from .of_merge import page_of_merge
from .render import html

__all__ = ["Page", "html", "page_of_comparison", "page_of_merge"]
