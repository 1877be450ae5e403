"""A working directory: its experiment, the files of its runs, its samples and exports.

`ownership` ties it to one experiment, and `lock` to one process at a time. `runs` is
the only module that knows where the files of a run are, `samples` holds generated
pictures, `exports` reads and describes a folder of weights. The modules are the public
names. They are imported one by one, because the report reads `runs` without jax.
May import: records, config, models, diffusion, data, training.
"""
