"""Routed experts over a small ragged batch: tiles of one expert's tokens, both products, the weighted sum."""
