"""The drafter: DFlash model, context KV, batching engine, Serve deployment."""
