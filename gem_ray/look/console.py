"""Where tables are printed."""

from __future__ import annotations

from rich.console import Console

_WIDTH = 240  # of redirected output, which has none of its own: no cell is cut there


def table_console(width: int = _WIDTH) -> Console:
    """As wide as the terminal; in a file or a pipe, as wide as tables may need.

    Args:
        width: there, in characters.
    """
    return Console(width=None if Console().is_terminal else width)
