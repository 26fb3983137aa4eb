"""What spans machines: contracts, wire codec, link, pairing and scaling policy, API, placement."""
