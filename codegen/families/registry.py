"""The families that convgen has, in the order in which reports list them.

Stage 4, part of plan. Input: nothing; output: the table that the compiler hands to the planner. A
new family is a module here and an entry.
"""

from __future__ import annotations

from ..planning.family import Family
from .direct import DIRECT
from .gather import GATHER
from .polyphase import POLYPHASE
from .stencil import STENCIL
from .window import WINDOW

FAMILIES: tuple[Family, ...] = (GATHER, WINDOW, POLYPHASE, DIRECT, STENCIL)
