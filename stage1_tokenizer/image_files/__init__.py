"""Reads image files of all supported formats and bit depths as pixels."""
