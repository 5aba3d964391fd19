"""The only door to Ray outside ``jobs/cluster``: a cluster, and the workers that prepare, train and score on it.

``config`` and ``environment`` import no Ray; ``cluster``, ``mapping``, ``training`` and ``scoring`` do. A process that
imports any of them has Ray's variables set before Ray is imported, because this package sets them first.
"""

from pipeline.orchestration import environment as environment
