"""The blocks a model is made of; each knows its op form and its cost."""
