"""Stage 1, parse: what a user writes becomes a `ConvTransposeSpec`, and text again.

In: text, or a torch module. Out: a spec that is whole and legal. Imports tables.
"""
