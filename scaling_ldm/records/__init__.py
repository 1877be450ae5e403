"""The frozen values that stages hand to one another, their files, and the errors.

`runs`, `laws` and `frontier` hold the records, `files` writes and reads them, `errors`
holds every exception of the library. May import: the standard library alone.
"""

from scaling_ldm.records.errors import Damaged
from scaling_ldm.records.files import (
    digest,
    dumps,
    from_json,
    loads,
    read_jsonl,
    to_json,
    write_file,
    write_jsonl,
    write_text,
)
from scaling_ldm.records.frontier import (
    Advice,
    BestGuidance,
    Cell,
    Choice,
    Crossing,
    Front,
    Frontier,
    FrontPoint,
)
from scaling_ldm.records.laws import (
    FitResult,
    HeldOut,
    Interval,
    Parabola,
    Parametric,
    PowerLaw,
    Refusal,
)
from scaling_ldm.records.runs import EvalRecord, RunSpec, SampleRecord, TrainRecord

__all__ = [
    "Advice",
    "BestGuidance",
    "Cell",
    "Choice",
    "Crossing",
    "Damaged",
    "EvalRecord",
    "FitResult",
    "Front",
    "FrontPoint",
    "Frontier",
    "HeldOut",
    "Interval",
    "Parabola",
    "Parametric",
    "PowerLaw",
    "Refusal",
    "RunSpec",
    "SampleRecord",
    "TrainRecord",
    "digest",
    "dumps",
    "from_json",
    "loads",
    "read_jsonl",
    "to_json",
    "write_file",
    "write_jsonl",
    "write_text",
]
