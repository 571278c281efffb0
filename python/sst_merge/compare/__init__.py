"""Merging methods side by side: the recipe, the rows, the report, equal refusal."""
