"""Text for a terminal: names from files must not control it."""

from __future__ import annotations


def escape_controls(text: str, keep: str = "") -> str:
    r"""Return a text with unprintable characters as escapes, such as ``\x1b``.

    Names in a checkpoint may hold escape sequences, which move the cursor or change the title of
    a terminal, and Unicode controls, which reorder the text that follows.

    Args:
        text: names, messages.
        keep: unprintable characters to leave as they are, such as the newline.
    """
    return "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text
    )
