"""Data sets, scribbles, augmentation and the dataset mapper."""
