"""The runs of a comparison and what they show together."""
