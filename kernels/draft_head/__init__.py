"""The output head of a drafter: best token and log-sum-exp of each row, without storing logits."""
