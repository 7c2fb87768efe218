"""`python -m convgen` is the command `convgen`.

Python has the current folder first on the path of `-m`, which the command has not: modules of that
folder would run in place of those that commands import. It is taken off here, too late for what
`import convgen` itself needs, a few modules of the standard library: in a folder of somebody else's
run `convgen`, or `python -P -m convgen`.
"""

import os  # which, as sys, Python has loaded by itself
import sys


def _drop_current_folder() -> None:
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Where convgen itself lies what it needs may lie beside it.
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != home:
        del sys.path[0]


if __name__ == "__main__":
    _drop_current_folder()
    from .cli.commands import main

    main()
