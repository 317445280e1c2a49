"""Floor 0: plain data. Sources, diagnostics, units, selectors, recipes. Never imports torch."""
