"""Whole networks: what gives a model's transposed convolutions emitted kernels.

Beside the stages; needs torch. Input: a graph of Dynamo's; output: what runs it.
"""
