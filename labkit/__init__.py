"""What lessons import: a synthetic world, a small base model, result cards and figures."""
