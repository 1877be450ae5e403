"""Pictures to numbers; every number carries the protocol that it was measured under.

`extractors` holds the networks whose features are compared, `reference` the statistics
of real pictures, and `feature_store` stores features batch by batch. `measures`
computes the metrics of config, `floor` the two reference values of a Frechet distance,
`likelihoods` the bounds on held-out data. `protocol` says which numbers may be
compared, `numbers` makes records of them, and `planned_metrics` tells a plan which no
run will have. May import: config, records, metrics, models, data, training.
"""

from scaling_ldm.evaluation.protocol import ProtocolError, difference, same_protocol

__all__ = ["ProtocolError", "difference", "same_protocol"]
