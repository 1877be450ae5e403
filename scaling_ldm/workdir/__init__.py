"""A working directory: whose it is, its finished runs, and exported weights.

`ownership` ties it to one experiment, `runs` finds what has been trained in it,
`exports` reads and describes a folder of weights. May import: config, records, the
numerics, data, training.
"""
