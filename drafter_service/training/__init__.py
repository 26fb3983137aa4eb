"""The DFlash trainer: continuations, losses, checkpoints, curves."""
