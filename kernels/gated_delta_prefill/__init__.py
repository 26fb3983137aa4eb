"""The gated delta rule over long rows of certain tokens, a tile of them at a time."""
