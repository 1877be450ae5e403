"""The stages of a study, one verb a file.

Each has `run`, and `check` if something can be refused before any stage runs. They
hand results to one another in files of records only; no stage imports another.
May import: every folder but diffusion, report, study and main.
"""
