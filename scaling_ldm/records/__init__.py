"""The frozen values that stages hand to one another, their files, and the errors.

`runs`, `measurements`, `goodput`, `laws`, `rate_laws`, `comparison` and `frontier` hold
the records, and `errors` holds every exception of the library. `files` writes and reads
records, `whole_files` writes files whole or not at all, `upgrade` reads the files of
older versions. `table` reads the measurements of studies as one table, `rows_of` makes
its rows, `joined` adds them to evaluations and the frontier, and `results` finds those
of the last steps of runs.

`places` tells local folders from URLs, `objects` has the paths of the latter, and
`backends` asks their stores.

May import: the standard library alone; `write_parquet` imports pyarrow, and a path on
gs:// or s3:// fsspec and gcsfs or s3fs.
"""

from scaling_ldm.records.comparison import (
    AtBudget,
    ComparedLaw,
    CrossingBudget,
    EqualLoss,
    LawComparison,
)
from scaling_ldm.records.compiled import COLLECTIVES, Collective, CompiledProgram
from scaling_ldm.records.errors import Damaged, MeasurementConflict, NewerVersion
from scaling_ldm.records.files import (
    check_owner,
    complete_lines,
    digest,
    dumps,
    from_json,
    json_object,
    loads,
    parse_object,
    read,
    read_attempts,
    read_experiment,
    read_json,
    read_jsonl,
    to_json,
    write_json,
    write_jsonl,
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
    MeasuredCell,
)
from scaling_ldm.records.goodput import Attempt
from scaling_ldm.records.joined import read_evaluations, read_frontier
from scaling_ldm.records.laws import (
    FitResult,
    HeldOut,
    Interval,
    LeftOut,
    LossForm,
    MinimaEstimate,
    OffsetLaw,
    Parabola,
    Parametric,
    PowerLaw,
    Refusal,
)
from scaling_ldm.records.measurements import Measurement
from scaling_ldm.records.rate_laws import BestRate, RateFit, RateLaw
from scaling_ldm.records.runs import (
    EvalRecord,
    Evaluation,
    RunSpec,
    SampleRecord,
    TrainRecord,
    epochs,
)
from scaling_ldm.records.table import read_plan, read_table, write_csv, write_parquet
from scaling_ldm.records.upgrade import (
    FIRST,
    SCHEMA,
    stamped,
    unstamped,
    version_of,
)
from scaling_ldm.records.whole_files import (
    in_one_line,
    is_full,
    remove_leftovers,
    unfinished,
    write_file,
    write_text,
    writing,
)

__all__ = [
    "Advice",
    "AtBudget",
    "Attempt",
    "BestGuidance",
    "BestRate",
    "Cell",
    "COLLECTIVES",
    "Choice",
    "Collective",
    "ComparedLaw",
    "LawComparison",
    "CompiledProgram",
    "Crossing",
    "CrossingBudget",
    "Damaged",
    "EqualLoss",
    "MinimaEstimate",
    "EvalRecord",
    "Evaluation",
    "FIRST",
    "FitResult",
    "Front",
    "FrontPoint",
    "Frontier",
    "HeldOut",
    "LeftOut",
    "LossForm",
    "Interval",
    "MeasuredCell",
    "Measurement",
    "MeasurementConflict",
    "NewerVersion",
    "Parabola",
    "Parametric",
    "OffsetLaw",
    "PowerLaw",
    "RateFit",
    "RateLaw",
    "Refusal",
    "RunSpec",
    "SCHEMA",
    "SampleRecord",
    "TrainRecord",
    "check_owner",
    "complete_lines",
    "digest",
    "in_one_line",
    "is_full",
    "dumps",
    "epochs",
    "from_json",
    "json_object",
    "loads",
    "parse_object",
    "read",
    "read_attempts",
    "read_evaluations",
    "read_frontier",
    "read_experiment",
    "read_json",
    "read_jsonl",
    "read_plan",
    "read_table",
    "remove_leftovers",
    "stamped",
    "to_json",
    "unfinished",
    "unstamped",
    "version_of",
    "write_csv",
    "write_file",
    "write_json",
    "write_jsonl",
    "write_parquet",
    "write_text",
    "writing",
]
