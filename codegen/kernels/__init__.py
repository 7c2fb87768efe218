"""Stage 5, render: what the text of every kernel is made of, whatever its family.

In: a plan and its sizes. Out: lines of Triton. Imports planning and what is below.
"""
