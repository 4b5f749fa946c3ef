"""What a caller may set, what the checkpoint says, and what both come to on this machine."""
