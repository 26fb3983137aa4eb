"""The candidate selector of DFlash 2: one path through the candidates of a block's rows."""
