"""RMSNorm, with the residual addition in front of it if there is one."""
