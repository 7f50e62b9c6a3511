"""The data of conditions (data.conditions): paired images, captions, and the tokenizers of texts."""
