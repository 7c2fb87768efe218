"""Stage 5, render: the names in the templates, and the text of a file.

In: a plan. Out: a `KernelSource`. Imports families and the layers below it.
"""
