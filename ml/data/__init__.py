"""Data, from a source to a split: raw files, manifest, validation, source versions, training sets, ledgers, splits."""
