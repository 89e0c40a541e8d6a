"""Real models to serve and to learn from: see README.md."""
