"""Timing on a GPU: layers beside torch, and tiles beside each other.

In: cases. Out: rows, reports, plots and files of choices. Imports project.
"""
