"""Stage 1, parse: from what a user writes to a `ConvTransposeSpec`, and back to text.

In: text, or a torch module. Out: a complete, checked spec. Imports tables.
"""
