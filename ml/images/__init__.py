"""Pictures: decoding, facts of a file, augmentation, and the cache of decoded pixels."""
