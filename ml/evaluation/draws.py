"""How many draws an interval is made of. Presets and DAG files read this, so nothing is imported here."""

MIN_DRAWS, MAX_DRAWS = 500, 10_000
"""The fewest draws of which an interval may decide something, and the most that are made.

The percentiles of few draws lie too close together: those of 8 are all but the smallest and the largest of them.
"""
