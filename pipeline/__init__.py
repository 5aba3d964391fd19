"""The way of the data: raw records → shards → stream → training → evaluation → promotion."""
