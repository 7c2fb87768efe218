"""A user's project: the `[tool.convgen]` table, its generated files, the build backends' hooks.

In: pyproject.toml. Out: generated files, or how those on disk differ from them. Imports execution.
"""
