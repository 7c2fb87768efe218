"""What stands in a user's project: its table, the files of a build, the hooks of backends.

In: pyproject.toml. Out: files, and what differs from them. Imports execution.
"""
