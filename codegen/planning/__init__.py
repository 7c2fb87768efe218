"""Stage 4, plan: which kernel of which tile and launch grid, and what it costs on a target.

In: a spec, its phases, a target. Out: a `KernelPlan`. Imports symbolic and what is below.
"""
