"""Which experts see a token, and with what weights."""
