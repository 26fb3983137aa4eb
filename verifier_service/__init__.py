"""The target: model, KV cache, scheduler, acceptance, engine, rank processes, Serve deployment."""
