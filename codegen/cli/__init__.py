"""The command line: options, messages and exit codes.

In: arguments. Out: text or JSON on stdout, messages on stderr. May import every other package.
"""
