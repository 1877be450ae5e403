"""Networks as pure functions of nested dicts of arrays.

denoisers and encoders hold the networks, weights reads and writes their published
parameters. layers, attention and positions are the parts that they share, and shapes
names the array types. `from_config` builds the network of an experiment; `pretrained`
opens a frozen network by name. May import: records, config.
"""
