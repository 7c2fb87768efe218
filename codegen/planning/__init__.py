"""Stage 4, plan: choice of kernel family, tile and launch grid, and their cost on a target.

In: a spec, its phases, a target. Out: a `KernelPlan`. Imports symbolic and the layers below it.
"""
