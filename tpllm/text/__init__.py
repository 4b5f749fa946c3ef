"""Between text and tokens, in the caller's process: prompts in, outputs out."""
