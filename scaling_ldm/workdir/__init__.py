"""A working directory: its experiment, the files of its runs, its samples and exports.

The modules are the public names. They are imported one by one, because the report reads
`runs` without jax.

Whose it is, and who works in it:

- ownership: whether it is this experiment's and whether it is complete.
- lock: files that say which process works on what.
- lock_file: what a lock does with its file.
- ending: ends a process, and detects that another one of its job is gone.
- exit_status: the exit status of each error.

Its runs:

- runs: the files, records and weights of the runs.
- missing: rows of a plan that are still to be trained.
- plan_table: the plan as text for people.
- laws_from: the laws that advice and a plan are made from.
- proposals: which runs to add to a fitted study.

Its samples and exports:

- samples: the pictures of the generate stage.
- sample_grid: these pictures in one picture.
- exports: weights in a folder, and the card that describes them.

Weights:

- initial_weights: finds the weights that training starts from.
- init_record: these weights, as the directory records them.
- tuned_from: the best learning rates that a study takes from another one.
- loading: opens what was trained as a model that draws pictures.
- pipelines: opens a folder of diffusers.
- scheduler_config: what its scheduler_config.json says.

May import: records, config, laws, models, diffusion, data, training.
"""
