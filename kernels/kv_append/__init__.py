"""Rotary positions for a step's queries and keys, and the append of its keys and values to the paged cache."""
