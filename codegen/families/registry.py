"""The table of all kernel families, in the order in which reports list them.

Stage 4, plan. Input: nothing; output: the table that the compiler hands to the planner. A new
family needs a module in this folder and an entry here.
"""

from __future__ import annotations

from ..planning.family import Family
from .direct import DIRECT
from .gather import GATHER
from .polyphase import POLYPHASE
from .stencil import STENCIL
from .window import WINDOW

FAMILIES: tuple[Family, ...] = (GATHER, WINDOW, POLYPHASE, DIRECT, STENCIL)
