"""Stage 2, decompose: a layer as integers; phases, groups, blocks of rows, boxes, tiles.

In: a spec. Out: what each axis is made of. Imports language; no symbols, no text.
"""
