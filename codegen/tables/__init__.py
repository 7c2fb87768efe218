"""Facts: dtypes and precisions, GPUs, pointwise stages; one row each.

In: nothing. Out: frozen rows, found by name. Imports nothing of convgen but `errors`.
"""
