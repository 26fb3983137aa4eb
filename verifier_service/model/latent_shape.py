"""The widths of multi-head latent attention, which of its two forms costs less, and what the expanded one takes."""

from __future__ import annotations

from dataclasses import dataclass

SECTION_ENTRIES = 1 << 26  # of the keys and values that exist at once where contexts are expanded section by section
SECTION_STEP = 128  # tokens of a section are a multiple of it


@dataclass(frozen=True)
class LatentShape:
    """The heads of this rank; the widths of a head's content key, rotary key and value, and of the latent."""

    heads: int
    content: int
    rotary: int
    value: int
    latent: int

    @property
    def cached(self) -> int:
        """Values in the cache per token: the latent and the rotary key."""
        return self.latent + self.rotary

    def expands(self, rows: int, context: int) -> bool:
        """Do `rows` rows of one request over `context` tokens cost fewer multiplications in expanded form?"""
        maps = self.latent * (self.content + self.value)  # of a row if absorbed, of a token if expanded
        saved = 2 * self.latent - self.content - self.value  # of each pair of row and token
        return rows * (maps + context * saved) > context * maps

    @property
    def section(self) -> int:
        """Context tokens whose keys and values exist at once in a layer over kernels: as many for 8 heads as for 64
        take the same memory."""
        tokens = SECTION_ENTRIES // (self.heads * (self.content + self.value))
        return max(1, tokens // SECTION_STEP) * SECTION_STEP

    def workspace_bytes(self, rows: int, itemsize: int) -> int:
        """Of a layer over kernels while `rows` rows attend in expanded form, whatever their contexts: a section's
        latents, keys and values of `itemsize` bytes an entry, and in float32 what the rows have seen so far."""
        section = self.section * (self.cached + self.heads * (self.content + self.value))
        return section * itemsize + 4 * rows * self.heads * (self.value + 2)
