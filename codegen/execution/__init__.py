"""What needs torch, Triton or NumPy: loading, compiling and verifying emitted files.

In: emitted text. Out: modules, machine code, reports. The compiler imports none of it.
"""
