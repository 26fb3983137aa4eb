"""`paceline simulate`: a deploy file under load, in virtual time and without GPUs.

virtual_time is the clock; drafters, links and verifier are the parts, in which the policies that serve run as they are;
run puts them under load; sweep compares; setup reads, show prints. plan.times prices steps and drafts.
"""
