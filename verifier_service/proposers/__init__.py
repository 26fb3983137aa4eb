"""Where drafts come from: remote, colocated, none."""
