"""Models: how the layers are wired, and where their weights come from."""
