"""Where is compute best spent by a class-conditional DiT?

Paper B's grid with adaLN-Zero blocks, which read a label and no text. The labels are
the 16 colours of the icons. Neither paper has run this grid. Every other setting is
paper B's, so that the two can be compared.

Cost: 7.6e19 FLOPs. Expect 42 runs. No law is published for this grid; the report shows
paper B's beside it.
Command: python -m scaling_ldm.main --config experiments/dit_class_conditional.py
"""

from experiments import base


def get_config():
    c = base.paper_b("dit_class_conditional", 1e17, 3e17, 6e17, 1e18, 3e18, 6e18)
    c.question = "Where is compute best spent by a class-conditional DiT?"
    c.model.architecture = "adaln_zero"
    c.model.classes = 16
    return c
