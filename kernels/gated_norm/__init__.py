"""The gated RMSNorm behind a delta rule."""
