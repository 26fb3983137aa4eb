"""The gated delta rule over a verified block from the committed state, and the commit of its accepted prefix."""
