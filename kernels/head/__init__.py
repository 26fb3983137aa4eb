"""The target's output head: logits in float32, or the token that wins a row's race, without logits."""
