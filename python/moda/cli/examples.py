"""What the commands' help texts share."""

from __future__ import annotations


def example(*lines: str) -> str:
    """Command lines as the help shows them."""
    return "[bold]Examples[/bold]\n\n" + "\n\n".join(f"[cyan]$ {line}[/cyan]" for line in lines)
