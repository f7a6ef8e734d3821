"""Images: decoding, the facts of each file, augmentation, and the cache of decoded pixels."""
