"""A working directory with a finished study whose laws are known, and its page."""

import contextlib
import csv
import dataclasses
import json
import math
import pathlib
import re
from html import parser
from typing import Any

import matplotlib.figure
import numpy as np
import pytest

from scaling_ldm import records
from scaling_ldm.laws import fit
from scaling_ldm.records import (
    Evaluation,
    RunSpec,
    SampleRecord,
    TrainRecord,
    measurements,
    table,
)
from scaling_ldm.records.measurements import LOSS, RAW, TRAIN_LOSS, stratum

BUDGETS = (1e11, 2e11, 4e11, 8e11, 1.6e12)
EXPONENT = 0.47  # of the N law that the losses are made from
TROUBLE = "<script>alert('caption')</script> & \"quoted\""
VOID = {"meta", "br", "img", "hr", "link", "input"}


def make_workdir(
    workdir: pathlib.Path, kind: str = "plain", lean: bool = False
) -> pathlib.Path:
    """A finished study: 5 budgets x 7 sizes, one failed run, samples and a fit.

    Args:
      workdir: where to write.
      kind: "plain"; "refused": the smallest budget's minimum is outside its grid;
        "few": two budgets only, so that every law is refused; "unfitted": no
        laws.json and no samples.
      lean: without training curves and samples, whose figures take time.
    """
    rng = np.random.default_rng(0)
    budgets = BUDGETS[:2] if kind == "few" else BUDGETS
    specs, trained, measured = [], [], {}
    for budget in budgets:
        best = 1.4e5 * (budget / 4e11) ** EXPONENT
        floor = 0.31 * (budget / 4e11) ** -0.09
        centre = best * 8 if kind == "refused" and budget == budgets[0] else best
        for i, width in enumerate((32, 48, 64, 80, 96, 128, 160)):
            n = int(centre * 5 ** ((i - 3) / 3))
            loss = floor + 0.035 * math.log(n / best) ** 2 + rng.normal(0, 0.003)
            spec, record = _run(budget, n, width)
            losses = {(LOSS, "ema"): loss, (LOSS, RAW): loss + 0.01}
            losses |= {(TRAIN_LOSS, RAW): loss + 0.02}
            if budget == budgets[-1] and i == 6:
                record = dataclasses.replace(
                    record,
                    status="non_finite_loss",
                    detail="loss became nan at step 37 of 900",
                    **{
                        k: getattr(record, k) / 20
                        for k in ("flops", "hardware_flops", "six_nd", "seconds")
                    },
                )
                losses = {(TRAIN_LOSS, RAW): loss + 0.02}
            specs.append(spec)
            trained.append(record)
            measured[spec.run_id] = losses
    records.write_jsonl(workdir / "runs.jsonl", specs)
    for spec, record in zip(specs, trained, strict=True):
        folder = workdir / "runs" / spec.run_id
        records.write_jsonl(folder / "record.json", [record])
        table.append_rows(
            folder / table.FILE,
            [
                row(spec, spec.steps, metric, weights, value)
                for (metric, weights), value in measured[spec.run_id].items()
            ],
        )
        if lean:
            continue
        end = measured[spec.run_id][TRAIN_LOSS, RAW]
        lines = _curve(spec, record, end, rng)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        records.write_text(folder / "metrics.jsonl", text)
    experiment = {
        "name": "icons",
        "question": "How should a small budget be split between size and data?",
        "config": {
            "model": {"record": "Model", "depth": 4, "note": TROUBLE},
            "optim": {"beta2": 0.99},
        },
        "config_hash": "0123456789abcdef",
    }
    records.write_text(workdir / "experiment.json", json.dumps(experiment))
    environment = {"versions": {"numpy": np.__version__}, "host": {"cores": 2}}
    records.write_text(workdir / "environment.json", json.dumps(environment))
    if kind == "unfitted":
        return workdir
    result = fit.fit_records(
        trained, records.read_table(workdir), weights="ema", bootstrap=200
    )
    records.write_text(workdir / "laws.json", records.dumps(result))
    if not lean:
        sample(workdir, specs[-2].run_id)
    return workdir


def _curve(
    spec: RunSpec, record: records.TrainRecord, end: float, rng: np.random.Generator
) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl: a noisy curve that falls to `end`."""
    steps = np.arange(1, 61) * record.steps / 60
    curve = end * (1 + 3 * np.exp(-steps / steps[-1] * 14))
    curve *= 1 + 0.4 * (steps / steps[-1] + 0.02) ** -0.25 - 0.4
    curve += rng.normal(0, 0.01, 60)
    lines: list[dict[str, Any]] = [
        {"step": s, "loss": y, "flops": s * spec.flops_per_step, "seconds": s / 50}
        for s, y in zip(steps.round().tolist(), curve.tolist(), strict=True)
    ]
    if record.status != "finished":
        lines = [*lines[:3], {**lines[3], "loss": "nan"}]
    return lines


def row(spec: RunSpec, step: int, metric: str, weights: str, value: float):
    """A row of the table; its protocol is that of the studies here."""
    protocol = table.loss_protocol_hash(metric, {}, {})
    return measurements.measurement(
        spec,
        step=step,
        metric=metric,
        value=value,
        weights=weights,
        protocol_hash=protocol,
    )


@contextlib.contextmanager
def figures_as(*kinds: str):
    """Figures are saved in these forms only; PNG and PDF files of others are empty.

    Three quarters of the time of a report are the three forms of its figures.
    """
    save = matplotlib.figure.Figure.savefig

    def savefig(figure, out, *, format, **options):
        if format in kinds:
            save(figure, out, format=format, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(matplotlib.figure.Figure, "savefig", savefig)
        yield


def add_curves(workdir: pathlib.Path, marks: int = 6) -> None:
    """Losses at marks through training and by stratum of t, as training measures."""
    for spec in records.read_jsonl(workdir / "runs.jsonl"):
        path = workdir / "runs" / spec.run_id / table.FILE
        rows, _ = table.read_rows(path)
        added = []
        for end in [r for r in rows if r.metric == LOSS and r.step == spec.steps]:
            steps = {math.ceil(spec.steps / 2**k) for k in range(1, marks)}
            for step in steps - {spec.steps}:
                value = end.value * (1 + 0.12 * math.log2(spec.steps / step))
                added.append(row(spec, step, LOSS, end.weights, value))
            for k in range(10):
                value = end.value * (1.6 - 0.12 * k)
                added.append(row(spec, spec.steps, stratum(k), end.weights, value))
        table.append_rows(path, added)


def evaluate(workdir: pathlib.Path, metric: str, weights: str, **changes) -> None:
    """Writes an evaluation of each finished run's end: 100 times its loss.

    Args:
      changes: fields of the records.
    """
    found = []
    for spec in records.read_jsonl(workdir / "runs.jsonl"):
        rows, _ = table.read_rows(workdir / "runs" / spec.run_id / table.FILE)
        for end in rows:
            if (end.metric, end.weights, end.step) == (LOSS, "ema", spec.steps):
                value = 100 * end.value
                given = {
                    "run_id": spec.run_id,
                    "checksum": "",
                    "step": spec.steps,
                    "train_flops": end.flops,
                    "metric": metric,
                    "value": value,
                    "low": 0.9 * value,
                    "high": 1.1 * value,
                    "level": 0.9,
                    "doubt": "",
                    "images": 64,
                    "nfe": 8,
                    "flops": 1e9,
                    "protocol": {"ema": weights},
                    "protocol_hash": "a" * 16,
                }
                found.append(Evaluation(**given | changes))
    path = workdir / "evaluations.jsonl"
    before = records.read_jsonl(path) if path.exists() else []
    records.write_jsonl(path, [*before, *found])


def _run(budget: float, n: int, width: int) -> tuple[RunSpec, TrainRecord]:
    batch, positions = 32, 80
    per_step = int(6.6 * n * batch * positions)
    steps = round(budget / per_step)
    tokens = steps * batch * positions
    same = {
        "run_id": f"c{budget:.2g}-w{width}-d4",
        "study": "icons",
        "budget_flops": budget,
        "width": width,
        "depth": 4,
        "params": n + 9000,
        "params_without_embeddings": n,
        "steps": steps,
        "images": steps * batch,
        "tokens": tokens,
        "learning_rate": 3e-3 * 64 / width,
        "seed": 0,
        "recipe_hash": "abcdef0123456789",
    }
    spec = RunSpec(
        **same,
        planned_flops=float(steps * per_step),
        flops_per_step=per_step,
        hardware_flops_per_step=per_step,
        heads=width // 16,
        batch_size=batch,
        image_tokens=steps * batch * 64,
        text_tokens=steps * batch * 16,
        warmup_steps=20,
        state_bytes=16 * n,
        activation_bytes=10**6,
        memory_bytes_per_device=10**7,
        accelerator="cpu",
        hours=0.01,
        utilisation=0.3,
    )
    record = TrainRecord(
        **same,
        status="finished",
        detail="",
        steps_planned=steps,
        flops=float(steps * per_step),
        hardware_flops=1.25 * steps * per_step,
        six_nd=6.0 * n * tokens,
        seconds=steps * per_step / 6e10,
        device="cpu",
        devices=2,
        flops_per_second=6e10,
        mfu=None,
        mfu_reason="no peak is listed for this device",
        restarts=0,
    )
    return spec, record


def sample(workdir: pathlib.Path, run_id: str) -> None:
    size = np.arange(32)
    images = np.full((16, 32, 32, 3), 245, np.uint8)
    for i, image in enumerate(images):
        r = np.hypot(size[:, None] - 15.5, size[None] - 15.5)
        image[r < 5 + i % 8] = (40 * (i % 5), 30, 200 - 12 * i)
    (workdir / "samples").mkdir(parents=True, exist_ok=True)
    np.save(workdir / "samples" / "images.npy", images)
    words = ("a blue circle", "a red magnifying glass on white", "a dark green cloud")
    record = SampleRecord(
        run_id=run_id,
        checksum="",
        sampler="euler",
        spacing="auto",
        steps=32,
        guidance=2.0,
        nfe=64,
        flops=3.1e11,
        seconds=5.4,
        weights="ema",
        seed=0,
        images=16,
        captions=(TROUBLE, *(words[i % 3] for i in range(15))),
        images_file="samples/images.npy",
    )
    records.write_jsonl(workdir / "samples" / "record.json", [record])


class Page(parser.HTMLParser):
    """Checks that elements nest, and keeps what a test wants to ask about."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.wrong, self.attributes, self.words = [], [], [], []
        self.tags, self.tables = [], []
        self.feed(text)
        self.close()
        self.text = re.sub(r"\s+", " ", "".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [(tag, k, v) for k, v in attrs]

    def handle_endtag(self, tag):
        if not self.open or self.open[-1] != tag:
            self.wrong.append((tag, self.getpos()))
        else:
            self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data

    def cells(self, heading: str) -> list[list[str]]:
        """Body and foot rows of the first table that has this column heading."""
        found = next(t for t in self.tables if heading in t[0])
        return found[1:]


def table_rows(workdir: pathlib.Path, name: str) -> list[dict[str, str]]:
    """Of a table of the report."""
    with open(workdir / "report" / "tables" / f"{name}.csv", encoding="utf-8") as f:
        return list(csv.DictReader(f))
