"""What is wrong with a question: of advise, compare, a plan by laws, the next runs.

    advise.budget                              which sampler, for a cost of one image
    advise.flops, advise.hours or advise.loss  what to train
    plan.from_laws with plan.budget            the one run that laws say
    plan.next with plan.budget                 which runs to add to a fitted study

Each field belongs to one question. A field of a question that is not asked is refused.
"""

from __future__ import annotations

from scaling_ldm.config import fields
from scaling_ldm.config.fields_answers import AdviseConfig, CompareConfig

TRAINING = ("flops", "hours", "loss")  # each asks what to train
ASK = (
    "--stages advise answers one question: --config.advise.budget=0.5 (which sampler, "
    "for a cost of one image in config.advise.unit), or one of --config.advise.flops, "
    "--config.advise.hours and --config.advise.loss (what to train)"
)
# How fast the devices of the training question are, by one of these.
SPEEDS = ("device", "flops_per_second", "run")
_OF_TRAINING = ("chips", "flops_per_second", "run", "price", "images", "laws")
_OF_DEVICE = ("dtype", "utilisation")  # of no other speed


def asked(cfg: AdviseConfig) -> list[str]:
    """The fields of advise that ask a question: none, one, or too many."""
    return [name for name in ("budget", *TRAINING) if getattr(cfg, name) > 0]


def problems_of(e: fields.Experiment) -> list[str]:
    """Questions that contradict one another, and fields that no question reads."""
    return [*_of_advise(e.advise), *_of_plan(e), *_of_compare(e.compare)]


def _of_advise(cfg: AdviseConfig) -> list[str]:
    found = asked(cfg)
    if len(found) > 1:
        both = " and ".join(f"config.advise.{name}" for name in found)
        return [f"{both} are set; {ASK}"]
    if not found:
        return []
    plain = AdviseConfig()
    changed = [n for n in vars(cfg) if getattr(cfg, n) != getattr(plain, n)]

    def unread(names: tuple[str, ...], why: str) -> list[str]:
        return [
            f"config.advise.{n} = {getattr(cfg, n)!r} is not read {why}"
            for n in names
            if n in changed
        ]

    if found == ["budget"]:
        return unread(
            _OF_TRAINING, "with config.advise.budget, which asks for a sampler"
        )
    (question,) = found
    by = f"with config.advise.{question}, which asks what to train"
    problems = unread(("unit",), by)
    speeds = [name for name in SPEEDS if getattr(cfg, name)]
    if len(speeds) > 1:
        both = " and ".join(f"config.advise.{name}" for name in speeds)
        problems.append(f"{both} both say how fast a device is: set one")
    if speeds != ["device"]:
        problems += unread(_OF_DEVICE, "without config.advise.device")
    if not speeds:
        how = (
            "one of config.advise.device, config.advise.flops_per_second and "
            "config.advise.run says how fast a device is"
        )
        if question == "hours":
            problems.append(f"config.advise.hours needs a speed: {how}")
        problems += [f"{line}: {how}" for line in unread(("chips", "price"), "alone")]
    return problems


def _of_plan(e: fields.Experiment) -> list[str]:
    cfg, problems = e.plan, []
    if cfg.from_laws and cfg.next:
        problems.append(
            "config.plan.from_laws plans one run, and config.plan.next proposes runs "
            "for a study that is fitted: set one, not both"
        )
    name = "from_laws" if cfg.from_laws else "next" if cfg.next else ""
    if name and not cfg.budget > 0:
        problems.append(
            f"config.plan.{name} needs config.plan.budget, in training FLOPs"
        )
    if cfg.budget and not name:
        problems.append(
            f"config.plan.budget = {cfg.budget!r} is not read without config.plan."
            "from_laws or config.plan.next; config.plan.budgets_flops has the budgets "
            "of a study"
        )
    if cfg.next_of != fields.PlanConfig.next_of and not cfg.next:
        problems.append(
            f"config.plan.next_of = {cfg.next_of!r} is not read without "
            "config.plan.next"
        )
    if cfg.next and not (cfg.reuse == "separate" and cfg.budgets_flops):
        problems.append(
            f"config.plan.next = {cfg.next} proposes single runs of budgets: it needs "
            "config.plan.budgets_flops and config.plan.reuse = 'separate'"
        )
    if cfg.from_laws and cfg.axes_only:
        problems.append(
            "config.plan.axes_only with config.plan.from_laws: that plan has one "
            "budget and one size"
        )
    if cfg.from_laws and cfg.steps:
        problems.append(
            f"config.plan.steps = {cfg.steps} with config.plan.from_laws: the steps "
            "follow from config.plan.budget"
        )
    return problems


def _of_compare(cfg: CompareConfig) -> list[str]:
    """Studies and groups that are named twice, and budgets out of order."""
    problems = []
    for field in ("studies", "groups"):
        values = getattr(cfg, field)
        if "" in values or len(set(values)) < len(values):
            problems.append(
                f"config.compare.{field} = {values}: may hold names, each at most once"
            )
    budgets = cfg.budgets
    if any(b <= 0 for b in budgets) or list(budgets) != sorted(set(budgets)):
        problems.append(
            f"config.compare.budgets = {budgets}: must be positive and increase"
        )
    return problems
