"""Whole networks: models whose transposed convolutions run emitted files.

In: a torch model, or a graph of Dynamo's. Out: the same model or what runs the graph, and reports.
Imports execution; needs torch.
"""
