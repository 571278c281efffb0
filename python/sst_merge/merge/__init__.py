"""How a merge decides: sources, pencils' filters, budgets, checks; `merge` and `Merged` for Python."""

from .api import Merged, merge

__all__ = ["Merged", "merge"]
