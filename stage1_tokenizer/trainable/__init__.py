"""Tokenizers that stage 1 can train: their base class, and the tokenizer with two levels."""
