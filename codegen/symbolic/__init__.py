"""Stage 3, index: offsets, bounds and masks as sympy expressions, and their printing as Triton.

In: sizes and their ranges. Out: accesses, and lines of Triton. Imports geometry.
"""
