"""The short causal convolution in front of the gated delta rule: over a verified block, and its commit."""
