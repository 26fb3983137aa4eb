"""The convolution of DFlash 2 over the rows of a draft block."""
