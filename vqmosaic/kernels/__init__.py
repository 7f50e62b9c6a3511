"""Faster versions of operations on some devices, each beside its plain reference."""
