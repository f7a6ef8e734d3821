"""The fetch stage: every image file of a source becomes a blob, and their list becomes a raw version."""
