"""Stages 3 and 5: the building blocks of emitted kernels that all families share.

In: a plan and its sizes. Out: lines of Triton. Imports planning and the layers below it.
"""
