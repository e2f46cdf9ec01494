"""What came before CNNs: hand-made descriptors of images, and the classifiers that read them."""
