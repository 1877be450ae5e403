"""The entry point, with a main thread that stands still while a file is there.

python tests/hanging.py FILE FLAGS...
"""

import pathlib
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from scaling_ldm import main
from scaling_ldm.training import loop

file = pathlib.Path(sys.argv.pop(1))
next_batch = loop.TrainingRun._next_batch


def hang_here(*arguments):
    while file.exists():
        time.sleep(0.1)
    return next_batch(*arguments)


loop.TrainingRun._next_batch = hang_here
main.run()
