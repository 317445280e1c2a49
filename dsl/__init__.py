"""Floor 1: text in, checked recipe out. Two surfaces, one meaning: the recipe language and its YAML twin."""
