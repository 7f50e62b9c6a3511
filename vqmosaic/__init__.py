"""The base package: recipes, files, run folders, training loops, seeding. It imports none of the other packages and does not load torch on import."""

__version__ = "0.2.0"
