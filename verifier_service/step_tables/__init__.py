"""Measured seconds of verify steps and of drafts, as files: what a machine takes before it is asked. Pure policy.

grid interpolates; tables reads and checks the files, whose format is in deploy/steps/README.md; prior is what an
engine's speculation control begins with.
"""
