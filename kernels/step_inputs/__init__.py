"""What the layers of a step ask about its tokens, from what the host said of its requests."""
