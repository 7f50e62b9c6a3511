"""The leaf package all others stand on: recipes, run folders, checkpoints, tracking, seeding. Importing it loads no torch."""

__version__ = "0.2.0"
