"""From logits to the target's own tokens: edits of logits, truncation, seeded sampling, log probabilities."""
