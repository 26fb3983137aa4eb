"""Latent attention of prefill chunks over keys and values made of latents, a section of their contexts at a time."""
