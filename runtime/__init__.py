"""Floor 5: run a recipe in stages, with a store, resume, exports and a report."""
