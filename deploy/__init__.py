"""Composition root: the Serve application and its YAML files."""
