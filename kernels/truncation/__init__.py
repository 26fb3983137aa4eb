"""Top-k, top-p and min-p: from logits to the least value that a token needs to stand."""
