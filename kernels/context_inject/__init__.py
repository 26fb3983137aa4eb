"""Keys and values of draft layers, normed, rotated and written to the drafter's pool: of contexts and of blocks."""
