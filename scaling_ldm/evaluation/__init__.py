"""Pictures -> numbers, each with the protocol without which it means nothing.

`extractors` are the networks whose features are compared, `reference` the statistics of
real pictures, `feature_store` keeps features batch by batch, `measures` computes the
metrics of config. May import: config, records, the numerics, data, training.
"""

from scaling_ldm.evaluation.protocol import ProtocolError, difference, same_protocol

__all__ = ["ProtocolError", "difference", "same_protocol"]
