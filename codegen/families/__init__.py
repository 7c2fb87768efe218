"""Stages 3 to 5: the kernel families, one module each, and the table that lists them.

In: a plan and its sizes. Out: the names in a kernel's template. Imports kernels.
"""
