"""The ways of computing a transposed convolution: one module each, and the table of all.

In: a plan and its sizes. Out: the names of a kernel's template. Imports kernels.
"""
