"""Stage 5, render: the names of the templates, and the text of a file.

In: a plan. Out: a `KernelSource`. Imports families and what is below.
"""
