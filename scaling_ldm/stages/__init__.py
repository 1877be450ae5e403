"""The stages of a study, one verb a file; they meet in files of records alone.

No stage imports another. May import: everything but `study` and `main`.
"""
