"""The scripts that made `models/tiny`: corpus -> tokenizer -> target -> continuations -> drafter.

Each is seeded and can be run again by anyone: see README.md beside this file.
"""
