"""Ray: the directory of members, placement of ranks."""
