"""Normalised latents and rotated rotary keys into the paged cache, and the rotation of queries."""
