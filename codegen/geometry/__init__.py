"""Stage 2, decompose: a layer in integers: phases, groups, row blocks, boxes and tiles.

In: a spec. Out: the decomposition of each axis. Imports language; no symbols, no emitted text.
"""
