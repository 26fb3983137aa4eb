"""The error of a checkpoint that cannot be used: names the file, the tensor or key, and the cure."""

from __future__ import annotations


class CheckpointError(ValueError):
    """A checkpoint directory that is missing, incomplete or of a kind that is not supported."""
