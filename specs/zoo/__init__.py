"""Small models shipped with effc."""
