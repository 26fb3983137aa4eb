"""The shipped tiny pair and the scripts that built it."""
