"""Attention of draft blocks over (context KV ++ the block's own KV) in the drafter's pool."""
