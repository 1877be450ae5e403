"""Networks: their parts, denoisers, frozen encoders, and weights in others' layouts.

`from_config` makes the network of an experiment, `pretrained` opens frozen ones by
name. Everything is a pure function of a dict of arrays. May import: config, records.
"""
