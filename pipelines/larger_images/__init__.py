"""Images that are larger than the training images."""
