"""Averages, schedules, warm-ups and policies of the rate that contradict others."""

from __future__ import annotations

from scaling_ldm.config import fields, names, rate_laws


def check_optimizer(e: fields.Experiment) -> list[str]:
    """Every reason why a well-typed `config.optimizer` cannot train."""
    cfg = e.optimizer
    return [
        *_check_averages(cfg),
        *_check_schedule(cfg),
        *_check_policy(e),
        *_check_tuned(cfg),
        *rate_laws.problems_of(cfg),
    ]


def _check_policy(e: fields.Experiment) -> list[str]:
    policy, model = e.optimizer.learning_rate_policy, e.model
    if policy not in names.BY_TENSOR:
        return []
    where = f"config.optimizer.learning_rate_policy = {policy!r}"
    problems = []
    if e.objective_kind != "denoising":
        problems.append(
            f"{where} knows the roles of a denoiser's tensors, and not those of "
            f"config.objective.kind = {e.objective_kind!r}"
        )
    if policy == "completep" and model.architecture == "unet":
        problems.append(
            f"{where} follows the depth, and a unet's second number is its resolutions"
        )
    if model.heads:
        problems.append(
            f"{where} needs heads of one width, since attention divides its scores by "
            "the root of that: give config.model.head_dim instead of "
            f"config.model.heads = {model.heads}"
        )
    return problems


def _check_tuned(cfg: fields.OptimizerConfig) -> list[str]:
    if cfg.learning_rate_policy != "tuned":
        return []
    where = "config.optimizer.learning_rate_policy = 'tuned'"
    problems = []
    if not cfg.tuned_from:
        problems.append(
            f"{where} needs config.optimizer.tuned_from, the working directory of a "
            "study with an axis of learning rates"
        )
    if cfg.rate_law != "none":
        problems.append(
            f"{where} and config.optimizer.rate_law = {cfg.rate_law!r} both say the "
            "rate"
        )
    if cfg.learning_rate != _DEFAULTS.learning_rate:
        problems.append(
            f"config.optimizer.learning_rate = {cfg.learning_rate} is not read by "
            f"{where}; its default is {_DEFAULTS.learning_rate}"
        )
    return problems


def _check_averages(cfg: fields.OptimizerConfig) -> list[str]:
    where = f"config.optimizer.averages = {cfg.averages}"
    problems = []
    for name in cfg.averages:
        sigma_rel = names.sigma_rel_of(name)
        if name != names.EMA and sigma_rel is None:
            problems.append(
                f"{where}: {name!r} is neither {names.EMA!r} nor a name like "
                f"{names.power_average(0.05)!r} or {names.power_average(0.1)!r}"
            )
        elif sigma_rel is not None and not 0 < sigma_rel <= names.LARGEST_SIGMA_REL:
            problems.append(
                f"{where}: the width {sigma_rel:g} must lie between 0 and "
                f"{names.LARGEST_SIGMA_REL:.4f}, which weighs all steps alike"
            )
    if len(set(cfg.averages)) < len(cfg.averages):
        problems.append(f"{where}: has duplicates")
    if names.EMA not in cfg.averages and cfg.ema_decay != _DEFAULTS.ema_decay:
        problems.append(
            f"config.optimizer.ema_decay = {cfg.ema_decay} is not read where "
            f"config.optimizer.averages does not name {names.EMA!r}; its default is "
            f"{_DEFAULTS.ema_decay}. To keep that average, set "
            f"config.optimizer.averages = ({names.EMA!r},)"
        )
    return problems


def _check_schedule(cfg: fields.OptimizerConfig) -> list[str]:
    problems = []
    warmups = {
        name: getattr(cfg, name)
        for name in ("warmup_fraction", "warmup_steps", "warmup_samples")
    }
    given = [f"{name} = {value}" for name, value in warmups.items() if value]
    if len(given) > 1:
        problems.append(
            f"config.optimizer has {' and '.join(given)}: one of them says how long "
            "the warm-up is, the others are 0"
        )
    if cfg.schedule == "wsd" and cfg.warmup_fraction + cfg.decay_fraction > 1:
        problems.append(
            f"config.optimizer.warmup_fraction = {cfg.warmup_fraction} and "
            f"config.optimizer.decay_fraction = {cfg.decay_fraction}: their sum "
            "must not exceed 1"
        )
    return problems


_DEFAULTS = fields.OptimizerConfig()
