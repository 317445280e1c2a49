"""Floor 0: plain data. Sources, diagnostics, units, selectors, recipes, architectures. Never imports torch."""
