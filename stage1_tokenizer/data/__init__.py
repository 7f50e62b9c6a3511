"""The images of a data set: sources, labels, splits, augmentation and batches."""
