"""Paper B's grid for the class-conditional DiT: adaLN-Zero blocks, a label and no text.

Labels are the icons' 16 colours. Neither paper has run this grid: the question is open,
and every other setting is paper B's, so that its answer can be laid beside theirs.

Cost: 7.6e19 FLOPs. Expect no published law to hold: it is reported beside paper B's.
Command: python -m scaling_ldm.main --config experiments/dit_class_conditional.py
"""

from experiments import base


def get_config():
    c = base.paper_b("dit_class_conditional", 1e17, 3e17, 6e17, 1e18, 3e18, 6e18)
    c.question = "Where is compute best spent by a class-conditional DiT?"
    c.model.architecture = "adaln_zero"
    c.model.classes = 16
    return c
