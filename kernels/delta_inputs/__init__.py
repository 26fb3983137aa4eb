"""What a Gated DeltaNet layer does element by element between its convolution and its delta rule."""
