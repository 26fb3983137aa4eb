"""Constrained decoding: grammars compiled beside the engine, masks for each row of a block, matchers per request."""
