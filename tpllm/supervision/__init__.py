"""Processes of an engine: they are started, watched, and ended whatever happens."""
