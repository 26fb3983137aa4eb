"""`paceline plan`: what a deploy file needs and gives, worked out without weights and GPUs.

gpus, memory, timing and fit are arithmetic; reading collects what they need; document is their result; show prints it.
"""
