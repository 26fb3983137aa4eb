"""From logits to accepted drafts: the target's own token at every row, and how many drafts it confirms."""
