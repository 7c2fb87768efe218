"""`python -m convgen` is the command `convgen`.

With `-m`, unlike for the command, Python puts the current folder first on the import path: modules
in that folder would shadow those that convgen imports. This module removes the folder. That is too
late for the few modules of the standard library that `import convgen` needs, so in a folder that
you do not trust run `convgen`, or `python -P -m convgen`.
"""

import os  # os and sys cannot be shadowed: Python loads them at start
import sys


def _drop_current_folder() -> None:
    home = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    # Keep the folder if convgen itself lies in it: its dependencies may lie there too.
    if not sys.flags.safe_path and sys.path[0] == os.getcwd() != home:
        del sys.path[0]


if __name__ == "__main__":
    _drop_current_folder()
    from .cli.commands import main

    main()
