"""Models: the wiring of layers to a network, and the sources of weights."""
