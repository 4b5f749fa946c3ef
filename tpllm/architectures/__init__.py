"""What a model is, as plain data without torch: a family turns config.json into a spec."""
