"""The loop that retrains on each new window of daily partitions: what there is, what follows from it, and doing it."""
