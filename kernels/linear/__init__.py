"""Products of few rows with a weight that is read once, plain or packed; partial sums for tensor-parallel inputs."""
