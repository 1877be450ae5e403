"""Published weights in and out: the layouts of others, paired with our trees.

One module per network says how its leaves are named there. layout pairs leaves with
tensors, blocks does so for stacked transformers, batch_norm folds fixed norms, files
and torch_file read checkpoints, hub finds them, native has our own layout. May import:
records, config, models above this folder, its denoisers and encoders.
"""
