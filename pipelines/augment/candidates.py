"""How the candidates of labelled images can be ranked and rejected: names and defaults. Does not load torch."""

RANKINGS = ("posterior", "likelihood")
"""How candidates can be ranked."""
MAX_ATTEMPTS = 32
"""Default number of attempts for an image whose candidates are rejected."""
