"""Loading, compiling and verifying emitted files, with torch, Triton or NumPy.

In: emitted text. Out: modules, machine code, reports. The compiler does not import this package.
"""
