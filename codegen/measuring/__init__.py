"""Timing on a GPU: layers against torch, and tiles against each other.

In: cases. Out: rows, reports, plots and choices files. Imports project.
"""
