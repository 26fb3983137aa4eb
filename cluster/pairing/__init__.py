"""Which drafter serves which verifier: pure policy on plain values."""
