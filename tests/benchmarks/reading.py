"""Rows a second and memory of one process that reads records, on simulated hosts.

    python tests/benchmarks/reading.py --folder records --threads 1,2,4
    python tests/benchmarks/reading.py --noise

Records are latents of 32 x 32 x 4 (mean and log-variance) and the features of 77
tokens, 768 wide, as `experiments/dit_1e21.py` has them with an autoencoder and CLIP's
larger text encoder. They are made here, with normal numbers, unless the folder has
them. With --dtype uint8 they are pixels of 32 x 32 x 3.

A training batch of 1024 is cut over 64 hosts. Some hosts in turn read their rows of
many batches through `data.batches`, in windows of shards. It is checked that the rows
of all hosts together are those of one. Rows a second depend on what else the machine
does; rows a CPU second, over all threads, much less. Memory is that of a new process
with one host's stream. Wanted is twice what one host of TPU v5p eats
with the network of 1728 x 27 (974M parameters): peak of a chip x share of it x chips of
a host / model FLOPs of a picture.

--noise reads nothing. It times the noise of the rows alone, in processor time: from a
generator of each row's own, as in training, and from one generator for all rows at
once, which is what one call for a batch could reach at best.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import pathlib
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

from scaling_ldm import config, data
from scaling_ldm.data import encoded, manifests, row_noise, shards

WIDTH, TOKENS = 768, 77
SIZE = (1728, 27)  # 974M parameters
CHIPS = 4  # of a host of TPU v5p
Row = dict[str, Any]


def peak_bytes() -> int:
    """The largest memory of this process so far."""
    # Not ru_maxrss: a process begins with that of the one that has started it.
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def experiment(flags: argparse.Namespace, threads: int = 1) -> config.Experiment:
    """The recipe of dit_1e21.py on records."""
    c = config.default()
    c.name = "reading"
    c.data.source, c.data.path = "memory", ""
    c.data.text_tokens, c.model.text_width = TOKENS, WIDTH
    c.data.shuffle_window, c.data.reader_threads = flags.window, threads
    c.encode.path = flags.folder
    c.encode.text_encoder = "owner/encoder"
    c.encode.dtype = flags.text_dtype
    if flags.dtype != "uint8":
        c.data.shape, c.encode.autoencoder = (32, 32, 4), "owner/autoencoder"
    c.plan.sizes = (SIZE,)
    return config.resolve(c)


def write(flags: argparse.Namespace) -> None:
    """Writes the records."""
    rng, wanted = np.random.default_rng(0), experiment(flags)
    layout = shards.Layout(
        shape=(32, 32, 3) if flags.dtype == "uint8" else (32, 32, 8),
        dtype=flags.dtype,
        text_width=WIDTH,
        text_dtype=flags.text_dtype,
    )
    store, summaries = shards.Store(flags.folder), []
    blank = np.zeros((32, 32, layout.shape[2] // 2 or 1), np.float32)
    for number in range(flags.shards):
        with store.replace(shards.shard_name(number)) as path:
            writer = shards.Writer(path, False, layout.dtype == "uint8")
            for i in range(flags.records):
                x = rng.standard_normal(layout.shape, np.float32)
                if layout.dtype == "uint8":
                    x = np.clip(127 + 60 * x, 0, 255)
                text = rng.standard_normal((TOKENS, WIDTH), np.float32)
                record = shards.Record(
                    x=x.astype(np.dtype(layout.dtype)),
                    features=text.astype(np.dtype(layout.text_dtype)),
                    caption="a caption",
                    name=f"{number}/{i}",
                    label=None,
                    held_out=i % 20 == 0,
                )
                writer.add(record, blank, blank)
            summaries.append(writer.finish([]))
    identity = encoded.identity(wanted)
    identity["autoencoder"] |= {"scale": 1.0, "shift": 0.0}
    null = np.zeros((1, WIDTH), np.dtype(layout.text_dtype))
    manifests.write(store, identity, layout, summaries, null, [], ())


def eaten(flags: argparse.Namespace) -> Row:
    """Pictures a second that one host of v5p trains on, and how that comes about."""
    from scaling_ldm.flops import peaks
    from scaling_ldm.training import train_step

    recipe = experiment(flags)
    functions = train_step.train_functions(recipe, *SIZE, unroll=False)
    counted = train_step.cost(recipe, functions, 1).flops.model
    peak = peaks.PEAKS["tpu-v5p"].flops_per_second["bfloat16"]
    share = recipe.plan.utilisation
    return {
        "flops_per_picture": counted,
        "peak_flops_per_second": peak,
        "utilisation": share,
        "chips": CHIPS,
        "pictures_per_second": peak * share * CHIPS / counted,
    }


def check_hosts(source: data.Source, flags: argparse.Namespace) -> None:
    """Checks that the rows of all hosts are those of the whole batch.

    Raises:
      SystemExit: they are not.
    """
    rows = np.arange(flags.batch).reshape(flags.hosts, -1)
    positions = 7 * flags.batch + rows
    whole = source.rows(positions.reshape(-1))
    for host, mine in enumerate(rows):
        found = source.rows(positions[host])
        for name, value in found.items():
            if value.tobytes() != whole[name][mine].tobytes():
                sys.exit(f"host {host} has other rows of {name}; nothing is timed")


class Counted:
    """A source that counts the rows it has made; blocks are made ahead of batches."""

    def __init__(self, source: Any) -> None:
        self._source, self.made = source, 0

    def rows(self, positions: np.ndarray) -> Any:
        found = self._source.rows(positions)
        self.made += len(positions)
        return found


def shards_of(source: encoded.Encoded, positions: np.ndarray) -> list[int]:
    """The shards that the pictures at some positions are in, ascending."""
    places = source._order.places(positions)
    return np.unique(source._side.shards(places)).tolist()


def measure(flags: argparse.Namespace, threads: int) -> Row:
    """One row of the table, in a process of its own."""
    source = encoded.Encoded(flags.folder, experiment(flags, threads), "train")
    each = flags.batch // flags.hosts
    count = -(-flags.rows // each)
    wall, cpu, files, of_all = [], [], [], []
    peak = 0
    for host in np.linspace(0, flags.hosts - 1, flags.timed, dtype=int).tolist():
        rows = host * each + np.arange(each, dtype=np.int64)
        counted: Any = Counted(source)
        stream = data.batches(counted, batch_size=flags.batch, rows=rows, prefetch=2)
        begin, used = time.perf_counter(), time.process_time()
        for _ in range(count):
            next(stream)
        seconds, cpu_seconds = time.perf_counter() - begin, time.process_time() - used
        wall.append(counted.made / seconds)
        cpu.append(counted.made / cpu_seconds)
        # A real host has one stream, so the memory is that of the first.
        peak = peak or peak_bytes()
        del stream
        positions = np.arange(count)[:, None] * flags.batch + rows
        files.append(len(shards_of(source, positions.reshape(-1))))
        of_all += shards_of(source, rows)
    check_hosts(source, flags)
    return {
        "threads": threads,
        "rows_per_second": statistics.median(wall),
        "rows_per_cpu_second": statistics.median(cpu),
        "slowest_host": min(wall),
        "files_of_a_host": max(files),
        "hosts_that_share_a_file": len(of_all) - len({*of_all}),
        "peak_bytes": peak,
        "bytes_of_a_row": sum(
            value.nbytes for value in source.rows(np.zeros(1, np.int64)).values()
        ),
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--folder", help="of the records")
    what.add_argument("--noise", action="store_true", help="time the noise alone")
    parser.add_argument("--shards", type=int, default=512)
    parser.add_argument("--records", type=int, default=32, help="of each shard")
    parser.add_argument(
        "--dtype", default="float16", choices=("float16", "bfloat16", "uint8")
    )
    parser.add_argument("--text_dtype", default="float16", choices=config.RECORD_DTYPES)
    parser.add_argument("--threads", default="1,2,4")
    parser.add_argument("--window", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--rows", type=int, default=2048, help="that each host reads")
    parser.add_argument("--timed", type=int, default=8, help="of the hosts")
    parser.add_argument("--json", type=pathlib.Path, help="write all numbers here")
    flags = parser.parse_args(arguments)
    if flags.folder:
        flags.folder = str(pathlib.Path(flags.folder).resolve())
    return flags


def noise() -> None:
    """Prints what the noise of a row takes, and its share in one call for all rows."""
    positions, together = np.arange(1024), np.random.Generator(np.random.Philox(0))
    for shape in (8, 8, 4), (16, 16, 4), (32, 32, 4), (64, 64, 4):
        ways = {
            "each": functools.partial(row_noise.normals, 1, positions, shape),
            "all": functools.partial(
                together.standard_normal, (len(positions), *shape), np.float32
            ),
        }
        took: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(9):
            for name, draw in ways.items():
                begin = time.process_time()
                draw()
                took[name].append((time.process_time() - begin) / len(positions))
        each, one = (min(took[name]) for name in ("each", "all"))
        print(f"{shape}: {1e6 * each:.1f} us a row, {1e6 * one:.1f} us in one call")


def main() -> None:
    """Makes the records if they are missing, then times every number of threads."""
    flags = parse()
    if flags.noise:
        return noise()
    if not (pathlib.Path(flags.folder) / shards.MANIFEST).exists():
        begin = time.perf_counter()
        write(flags)
        print(f"written after {time.perf_counter() - begin:.0f} s")
    facts = {
        "processor": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    print(", ".join(f"{name} {value}" for name, value in facts.items()))
    rows = []
    print("| threads | rows/s | rows/CPU s | files of a host | peak memory |")
    print("|---|---|---|---|---|")
    new = multiprocessing.get_context("spawn")
    for threads in map(int, flags.threads.split(",")):
        with new.Pool(1) as process:
            row = process.apply(measure, (flags, threads))
        rows.append(row)
        print(
            f"| {threads} | {row['rows_per_second']:.0f} "
            f"| {row['rows_per_cpu_second']:.0f} | {row['files_of_a_host']} "
            f"| {row['peak_bytes'] / 1e9:.2f} GB |",
            flush=True,
        )
    need = eaten(flags)
    one, best = (
        max(row[name] for row in rows) / need["pictures_per_second"]
        for name in ("rows_per_cpu_second", "rows_per_second")
    )
    print(
        "one host of {chips} v5p chips eats {pictures_per_second:.0f} pictures/s: "
        "{chips} x {peak_flops_per_second:.3g} FLOP/s x {utilisation} / "
        "{flops_per_picture:.4g} FLOPs".format(**need)
    )
    print(
        f"read: {best:.1f} x that here, {one:.1f} x for each core of this kind; "
        "wanted: at least 2"
    )
    if flags.json:
        result = {"command": sys.argv[1:], "machine": facts, "rows": rows, "need": need}
        flags.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
