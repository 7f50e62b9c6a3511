"""The transformer inside the prior."""
