"""embed: rows of a table, dense or packed, with positions and a token type, in C."""
