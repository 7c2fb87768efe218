"""Tables of facts: dtypes, precisions, GPUs and pointwise stages, one row each.

In: a name. Out: a frozen row. Imports nothing of convgen but `errors` and `values`.
"""
