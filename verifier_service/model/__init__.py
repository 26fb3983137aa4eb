"""Everything that touches transformers' model classes: plug-ins, loading, the runner of one rank."""
