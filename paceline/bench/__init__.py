"""Benchmarks. `engine`: the same weights and prompts through several decoders, without Ray. `server`: over HTTP.

`cli` holds the commands; pure parts (`loops`, `percentiles`, `figures`, `agreement`) know no torch.
"""
