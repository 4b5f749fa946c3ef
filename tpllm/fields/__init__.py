"""Fields of the settings dataclasses: each has its type, range, default and help in one place."""
