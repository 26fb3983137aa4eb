"""The proof that every family is exact: the real engine under random schedules against transformers' generate.

`python -m tests.verifier_service.families` runs a campaign and prints its table.
"""
