"""Life and death: starts the processes of an engine, watches them, and ends every one of them."""
