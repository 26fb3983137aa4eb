"""HTTP API (OpenAI-compatible), router and the client of the engines' ports."""
