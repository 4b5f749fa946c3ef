"""JSON schemas rewritten for the grammar compiler: plain data in, plain data out."""
