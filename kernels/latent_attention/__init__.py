"""Multi-head latent attention of ragged query rows over a paged cache of latents, in absorbed form."""
