"""Token sampling: decoding with a key-value cache, and sampling from logits."""
