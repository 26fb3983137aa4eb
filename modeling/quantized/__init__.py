"""Weights that stay packed in memory: which a checkpoint has (scheme), their value type (packed), how to read them."""
