"""What `ema average` refuses: arguments, or the content of checkpoints."""

from __future__ import annotations


class CheckpointError(Exception):
    """A checkpoint cannot be averaged; the text names the file or tensor, and what to do."""


class ArgumentError(Exception):
    """An argument is wrong; the text names it, and what to do."""
