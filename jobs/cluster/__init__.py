"""A verb on a cluster: Ray's jobs, and what is sent there and brought back."""
