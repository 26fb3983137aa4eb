"""The gate between the two products of an MLP."""
