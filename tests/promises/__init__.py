"""The promises of the design: which tests keep each, and what makes those tests fail."""
