"""The two-party, epoch-numbered link between one verifier and one drafter: control plane, tensor planes, messages."""
