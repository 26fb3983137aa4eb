"""The target's step over Triton kernels: what a GPU runs, and Triton's interpreter in tests. Needs triton."""
