"""Augmentation: pure functions of a key and an image, run on the device."""
