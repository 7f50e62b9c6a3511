"""Sampling tokens: decoding with a key-value cache and drawing from logits."""
