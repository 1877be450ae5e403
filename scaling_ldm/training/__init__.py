"""Training on devices, and trained or frozen networks run on them.

The modules are the public names. They are imported one by one, because some of them
are read without jax.

What is learnt:

- objective: the loss that a network is trained on, and its held-out error.
- objective_checks: which arrays an objective reads, and what its loss returns.
- captions: captions as the arrays that a denoiser reads.

A step:

- train_step: the pure functions of a run, and their compiled forms.
- accumulation: the gradient, of the whole batch or in passes.
- optimizer: the optimizer, its learning rates, and the averages of weights.
- averages: averages whose length is a share of the training so far.
- tracing: Python's garbage collector while functions are traced.
- kernel_check: compares an attention kernel with the plain form on the device.

Devices:

- mesh: the explicit mesh, and where each array lives.
- xla_flags: compiler flags for collectives that run beside arithmetic.
- topologies: devices that are not here, as their compilers describe them.
- ahead_of_time: a run's programs, compiled for such devices.
- capacity: whether this host and its devices can hold an experiment.
- step_memory: what a training step holds on one device.
- probe: how long a step of a plan takes on this machine.

A run:

- loop: the training loop of one run.
- checkpoint: state, data position and RunSpec on disk.
- checksum: a hash of a tree of arrays that is the same on every mesh.
- run_files: where the files of one run are.
- storage_faults: tells faults of storage from damaged files.
- s3_checkpoints: lets orbax write checkpoints on s3://.
- costs: what a run has cost so far.
- goodput: where the seconds of a run go.

Measuring:

- marks: the steps at which the held-out loss is measured.
- measuring: measures the losses of a run, and writes them.
- held_out: the validation set on the devices, and the loss on it.
- held_out_bound: bits per dim of held-out data.

What people see:

- progress: lines, JSON lines, TensorBoard, profiles.
- time_left: estimates of the time left.
- growing: text that grows, in an object of a store.

Jobs of several processes:

- jobs: joins a job, and stops all of its processes together.
- pulse: tells the processes that one is gone, and which one is slow.
- watchdog: looks whether training goes on.
- signals: stop, or save and go on.
- native_stderr: holds back what jax's client prints before it aborts.

Trained and frozen networks:

- encoding: an experiment's pretrained networks, run batch by batch.
- encode_progress: lines of the encode stage.
- survey: reads every picture, to decide which are held out.
- trained_model: trained weights, and how they are identified.
- loaded_model: a trained network with all that it takes to draw with it.
- inference: draws pictures with a trained model.

May import: records, config, flops, models, diffusion, data.
"""
