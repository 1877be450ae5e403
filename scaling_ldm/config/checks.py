"""Every reason why a well-typed experiment cannot run."""

from __future__ import annotations

import math
import os

from scaling_ldm.config import (
    fields,
    init_from,
    mix,
    names,
    nested,
    objective_kind,
    optimizer_checks,
    questions,
    ranges,
    reads,
)


class _Problems(list[str]):
    """Messages about one experiment."""

    def require(self, ok: bool, message: str) -> None:
        """Adds the message unless all is well."""
        if not ok:
            self.append(message)


def problems_of(e: fields.Experiment) -> list[str]:
    """Every reason why a well-typed experiment cannot run; empty if it can."""
    return mix.problems_of(e, _problems_of_part)


def _problems_of_part(e: fields.Experiment) -> list[str]:
    """What is wrong with an experiment whose pictures are of one source."""
    problems = _check_names(e)
    problems += reads.unread(e)
    problems += _check_encode(e)
    problems += _check_coarse(e)
    problems += objective_kind.problems_of(e)
    problems += init_from.problems_of(e)
    if e.objective_kind != "reconstruction":
        problems += _check_objective(e.objective)
    problems += ranges.problems_of(e)
    problems += [*optimizer_checks.check_optimizer(e), *nested.problems_of(e)]
    if e.model.architecture in names.CONVOLUTIONAL:
        problems += _check_convolutional(e)
    else:
        problems += _check_transformer(e)
    problems += [*_check_plan(e), *questions.problems_of(e), *_check_signals(e.train)]
    problems += [*_check_evaluation(e), *_check_fit(e)]
    return problems


def _check_names(e: fields.Experiment) -> list[str]:
    """Values that are not in the table of their field, and a bad name of the study."""
    problems = name_problems(e.name)
    for where, known in names.CHOICES.items():
        value = reads.value(e, where)
        if value not in known:
            close = names.nearest(value, known)
            hint = f" (did you mean {close!r}?)" if close else ""
            problems.append(
                f"config.{where} = {value!r}; known: {', '.join(known)}{hint}"
            )
    return problems


def name_problems(name: str) -> list[str]:
    """Why a study cannot be called this; its name is the name of a folder of runs/."""
    fits = name.strip() and not name.startswith(".") and not {"/", "\\"} & {*name}
    if fits and name.isprintable() and len(name.encode()) <= 200:
        return []
    return [
        f"config.name = {name!r}: must be the name of a folder, at most 200 bytes, "
        "without / and \\ and not hidden (its results go to runs/ and that name)"
    ]


def _check_plan(e: fields.Experiment) -> list[str]:
    """Budgets, sizes, checkpoints and devices that contradict one another."""
    require = (problems := _Problems()).require
    require(
        len(set(e.plan.sizes)) == len(e.plan.sizes), "config.plan.sizes has duplicates"
    )
    require(
        (e.plan.steps > 0) != (len(e.plan.budgets_flops) > 0),
        f"config.plan.steps = {e.plan.steps} and config.plan.budgets_flops = "
        f"{e.plan.budgets_flops}: set exactly one, and leave the other at 0 or ()",
    )
    require(
        all(b > 0 for b in e.plan.budgets_flops),
        f"config.plan.budgets_flops = {e.plan.budgets_flops}: must be positive",
    )
    require(
        list(e.plan.budgets_flops) == sorted(set(e.plan.budgets_flops)),
        f"config.plan.budgets_flops = {e.plan.budgets_flops}: must increase",
    )
    require(
        not (e.generate.run and e.generate.weights),
        "config.generate.run and config.generate.weights: set one, not both",
    )
    own = e.generate.captions
    require(
        all(caption.strip() for caption in own),
        f"config.generate.captions = {own}: a caption is empty",
    )
    require(
        not own or e.evaluate.network == "none",
        "config.generate.captions and config.evaluate.network: set one, not both; "
        "held-out pictures have other captions than your own, so the two sets cannot "
        "be compared",
    )
    require(
        not own or not e.data.coarse,
        "config.generate.captions and config.data.coarse: captions of your own have no "
        "coarse pictures",
    )
    marks = e.train.checkpoint_flops
    require(
        all(f > 0 for f in marks) and list(marks) == sorted(set(marks)),
        f"config.train.checkpoint_flops = {marks}: must be positive and increase",
    )
    require(
        e.mesh.replica == -1 or e.mesh.replica > 0,
        f"config.mesh.replica = {e.mesh.replica}: must be positive, or -1 for all "
        "devices that are left",
    )
    return problems


def _check_signals(cfg: fields.TrainConfig) -> list[str]:
    """Signals that are unknown, or that have two meanings."""
    problems = []
    for field in ("save_signals", "stop_signals"):
        values = getattr(cfg, field)
        unknown = [value for value in values if value not in names.SIGNALS]
        if unknown or len(set(values)) < len(values):
            problems.append(
                f"config.train.{field} = {values}: may hold "
                f"{', '.join(names.SIGNALS)}, each at most once"
            )
    if both := sorted(set(cfg.save_signals) & set(cfg.stop_signals)):
        problems.append(
            f"config.train.save_signals and config.train.stop_signals: {both[0]} is in "
            "both; a run goes on after the first kind and ends after the second"
        )
    return problems


def _check_fit(e: fields.Experiment) -> list[str]:
    """Metrics named twice, and weights that no run keeps.

    An axis of the averages gives runs different weights: then any name is accepted.
    """
    problems = []
    if "" in e.fit.metrics or len(set(e.fit.metrics)) < len(e.fit.metrics):
        problems.append(
            f"config.fit.metrics = {e.fit.metrics}: may hold metrics of the table of "
            "measurements, each at most once"
        )
    known = (names.RAW, *e.optimizer.averages)
    varied = any("optimizer.averages" in name for name, _ in e.plan.axes)
    varied |= len(e.compare.studies) > 0  # the runs are theirs
    if not varied and e.fit.weights not in ("", *known):
        problems.append(
            f"config.fit.weights = {e.fit.weights!r}: the runs have "
            f'{", ".join(known)} (config.optimizer.averages); "" is their first average'
        )
    return problems


def _check_evaluation(e: fields.Experiment) -> list[str]:
    """Names and counts of the stages that measure pictures."""
    problems = []
    for where, known in (
        ("evaluate.metrics", names.METRICS),
        ("evaluate.held_out", names.HELD_OUT_METRICS),
        ("compile.programs", names.PROGRAMS),
        ("frontier.samplers", names.SAMPLERS),
        ("report.published", names.PUBLISHED),
    ):
        values = reads.value(e, where)
        unknown = [value for value in values if value not in known]
        if unknown or len(set(values)) < len(values):
            problems.append(
                f"config.{where} = {values}: may hold {', '.join(known)}, each at most "
                f"once {names.did_you_mean(unknown, known)}".rstrip()
            )
    for where in ("frontier.steps", "frontier.guidances"):
        values = reads.value(e, where)
        if any(value <= 0 for value in values) or list(values) != sorted(set(values)):
            problems.append(f"config.{where} = {values}: must be positive and increase")
    if max(e.frontier.steps) > names.MOST_SAMPLER_STEPS:
        problems.append(
            f"config.frontier.steps = {e.frontier.steps}: at most "
            f"{names.MOST_SAMPLER_STEPS}"
        )
    if e.evaluate.bootstrap == 1:
        problems.append(
            "config.evaluate.bootstrap = 1: one resample shows no spread; set 0, "
            "or at least 2"
        )
    if e.frontier.images and e.evaluate.network == "none":
        problems.append(
            "config.frontier.images without config.evaluate.network: a frontier needs "
            f"one of {', '.join(names.FEATURE_NETWORKS[1:])}"
        )
    network, size = e.evaluate.network, e.evaluate.input_size
    for metric in e.evaluate.metrics:
        # An unknown metric or network already has a message.
        networks = names.METRICS.get(metric, names.FEATURE_NETWORKS)
        if network in names.FEATURE_NETWORKS and network not in (*networks, "none"):
            problems.append(
                f"config.evaluate.metrics has {metric}, which needs config.evaluate."
                f"network = {' or '.join(networks)}, not {network!r}"
            )
    if network == "lite0" and 0 < size < names.LITE0_LEAST:
        problems.append(
            f"config.evaluate.input_size = {size}: at least {names.LITE0_LEAST}, or 0 "
            "for lite0's own size; its features are averages over a map whose sides "
            "are 1/32 of this size, and a smaller map has too few positions"
        )
    return problems


def _check_transformer(e: fields.Experiment) -> list[str]:
    """Patches, labels and heads that do not fit the sizes or the input."""
    problems = _Problems()
    require = problems.require
    h, w = (*e.data.shape, 0, 0)[:2]
    p = e.model.patch_size
    require(
        p > 0 and h % max(p, 1) == 0 and w % max(p, 1) == 0,
        f"config.model.patch_size = {p} does not divide the {h}x{w} input",
    )
    patches = (h // max(p, 1)) * (w // max(p, 1))
    require(
        patches <= names.MOST_PATCHES,
        f"config.data.shape = {e.data.shape}: {patches:,} patches of config.model."
        f"patch_size = {p}; a network has a table of at most {names.MOST_PATCHES:,}",
    )
    require(
        e.model.architecture != "adaln_zero" or e.model.classes > 0,
        "config.model.classes = 0: adaln_zero needs labels, as many as the source has",
    )
    for width, depth in (s if len(s) == 2 else (0, 0) for s in e.plan.sizes):
        require(
            width > 0 and depth > 0,
            f"config.plan.sizes: ({width}, {depth}) is not (width, depth)",
        )
    require(
        (e.model.head_dim > 0) != (e.model.heads > 0),
        f"config.model.head_dim = {e.model.head_dim} and config.model.heads = "
        f"{e.model.heads}: exactly one of them is positive, the other 0",
    )
    name = "heads" if e.model.heads > 0 else "head_dim"
    divisor = max(getattr(e.model, name), 1)
    widths = sorted({width for width, *_ in e.plan.sizes if width > 0})
    odd = [width for width in widths if width % divisor]
    fits = ", ".join(map(str, ranges.divisors(math.gcd(*widths) or 1)))
    require(
        not odd,
        f"config.model.{name} = {divisor} does not divide the widths {odd} of "
        f"config.plan.sizes; common divisors of all widths: {fits}",
    )
    return problems


def _check_convolutional(e: fields.Experiment) -> list[str]:
    """Widths, heads and halvings that do not fit the sizes or the input."""
    problems = []
    name, model = e.model.architecture, e.model
    h, w = (*e.data.shape, 0, 0)[:2]
    for base, levels in (s if len(s) == 2 else (0, 0) for s in e.plan.sizes):
        if base <= 0 or not 1 <= levels <= 4:
            problems.append(
                f"config.plan.sizes: ({base}, {levels}) is not (base width, "
                f"resolutions) of {name}; there are 1 to 4 resolutions"
            )
            continue
        if base % max(model.groups, 1):
            problems.append(
                f"config.plan.sizes: base width {base} is not a multiple of "
                f"config.model.groups = {model.groups}"
            )
        if h % 2 ** (levels - 1) or w % 2 ** (levels - 1):
            problems.append(
                f"config.data.shape = {e.data.shape} cannot be halved {levels - 1} "
                f"times, as {levels} resolutions in config.plan.sizes ask for"
            )
        field = "heads" if model.heads > 0 else "head_dim"
        if name == "unet" and base % max(getattr(model, field), 1):
            problems.append(
                f"config.plan.sizes: base width {base} is not a multiple of "
                f"config.model.{field} = {getattr(model, field)}"
            )
    if name == "unet" and (model.heads > 0) == (model.head_dim > 0):
        problems.append(
            f"config.model.heads = {model.heads} and config.model.head_dim = "
            f"{model.head_dim}: exactly one of them is positive, the other 0. A unet "
            "has as many heads at every width (8 in paper A) or heads of one width (64 "
            "in Stable Diffusion 2)"
        )
    if name == "autoencoder_kl" and e.encode.autoencoder != "none":
        problems.append(
            "config.model.architecture = 'autoencoder_kl' learns pictures: "
            f"config.encode.autoencoder = {e.encode.autoencoder!r} must be 'none'"
        )
    return problems


def _check_coarse(e: fields.Experiment) -> list[str]:
    """A coarse picture that cannot be made."""
    k, (h, w) = e.data.coarse, (*e.data.shape, 0, 0)[:2]
    if not k or (k > 1 and h % k == 0 and w % k == 0):
        return []
    return [
        f"config.data.coarse = {k}: a {h} x {w} input cannot be made {k} times "
        "smaller; 0 gives none"
    ]


def _check_encode(e: fields.Experiment) -> list[str]:
    """Frozen networks, sources and denoisers that do not go together."""
    problems = []
    cfg = e.encode
    endless = e.data.source in names.ENDLESS
    if e.encoded and endless and not cfg.pictures:
        problems.append(
            f"config.encode.pictures = 0: the {e.data.source} are an endless stream; "
            "say how many of them the encode stage takes"
        )
    needs_path = "path" in names.DATA_SOURCES.get(e.data.source, ())
    needs_path &= e.data.source not in names.UNNAMED
    if needs_path and not (e.data.path or cfg.path):
        problems.append(
            f"config.data.path is not set: the {e.data.source} source reads its "
            "pictures from it; pass --config.data.path=FOLDER, or "
            "--config.encode.path=FOLDER of records made before"
        )
    own = "validation_path" if e.data.validation_path else "validation_split"
    if getattr(e.data, own) and e.data.split_by != "auto":
        problems.append(
            f"config.data.split_by = {e.data.split_by!r} with config.data.{own}: the "
            "pictures there are held out, so nothing is left to split; leave one out"
        )
    if e.encoded and cfg.autoencoder == "none" and e.data.shape[2:] not in ((3,), (1,)):
        problems.append(
            f"config.data.shape = {e.data.shape}: without config.encode.autoencoder a "
            "network sees pixels: (height, width, 3), or (height, width, 1) for grey"
        )
    if cfg.text_encoder == "minilm" and e.model.text_width != names.MINILM_WIDTH:
        problems.append(
            f"config.model.text_width = {e.model.text_width} with "
            f"config.encode.text_encoder = 'minilm', whose features are "
            f"{names.MINILM_WIDTH} wide: set that, or text_encoder = 'vocabulary'"
        )
    for name, value, known in (
        ("autoencoder", cfg.autoencoder, names.AUTOENCODERS),
        ("text_encoder", cfg.text_encoder, names.TEXT_ENCODERS),
    ):
        is_a_name = "/" not in value and not os.path.isdir(value)
        if is_a_name and value not in known:
            problems.append(
                f"config.encode.{name} = {value!r}; known: {', '.join(known)}; or a "
                "folder, or a hub id (owner/name)"
            )
    return problems


def _check_objective(o: fields.ObjectiveConfig) -> list[str]:
    """Combinations of known choices that a network cannot learn."""
    problems = []
    ends_in_noise = o.schedule == "rectified_flow" or o.zero_terminal_snr
    if ends_in_noise and o.prediction in ("epsilon", "score"):
        cause = (
            "config.objective.zero_terminal_snr"
            if o.zero_terminal_snr
            else "config.objective.schedule = 'rectified_flow'"
        )
        problems.append(
            f"config.objective.prediction = {o.prediction!r} with {cause}: at pure "
            "noise this prediction does not determine the picture; use v, x0 or flow"
        )
    short = o.schedule_steps < 1000 and not o.zero_terminal_snr
    if o.schedule in ("linear", "scaled_linear") and short:
        problems.append(
            f"config.objective.schedule_steps = {o.schedule_steps} with schedule "
            f"{o.schedule!r}: its betas are made for 1000 steps. With fewer steps "
            "the picture is still visible at the end; use cosine, or zero_terminal_snr"
        )
    if o.schedule == "edm":
        problems.append(
            "config.objective.schedule = 'edm' is for sampling: its x has noise of up "
            "to 80, and networks here do not scale their input; train on vp_cosine"
        )
    return problems
