"""Training a model to answer as another does."""
