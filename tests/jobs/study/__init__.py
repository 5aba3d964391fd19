"""The verb study."""
