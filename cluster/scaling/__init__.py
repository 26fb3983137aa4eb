"""How many replicas: pure policy on plain values."""
