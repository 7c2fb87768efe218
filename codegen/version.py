"""The version of convgen, which headers, hooks and the command line state."""

from __future__ import annotations

__version__ = "0.1.0"
