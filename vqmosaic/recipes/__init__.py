"""Recipes: their sections and fields, reading and writing them, and the rules that choose fields from the data."""
