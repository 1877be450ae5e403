"""Tables of captions beside pictures: .csv, .jsonl or .parquet, a row for each file.

They are what Hugging Face's ImageFolder documents: metadata.csv, metadata.jsonl or
metadata.parquet, with a column file_name.
"""

from __future__ import annotations

import csv
import io
import json
import posixpath
from typing import Any

from scaling_ldm import config
from scaling_ldm.data.pictures import columns

NAMES = (
    *("captions.csv", "captions.jsonl", "captions.parquet"),
    *("metadata.csv", "metadata.jsonl", "metadata.parquet"),
)
ENDINGS = (".csv", ".jsonl", ".parquet")
HEAD = 1 << 16  # bytes of a table of text that tell whether it is one


def read(
    data: bytes, where: str, file: str, caption: str, label: str
) -> dict[str, tuple[object, object]]:
    """{file: (caption, label or None)} of a table of captions.

    Args:
      data: its bytes.
      where: its name, whose ending says what it is.
      file, caption, label: columns; "" for the usual names, or for no label.

    Raises:
      ConfigError: it cannot be read, has no rows or no such columns, or names a file
        twice.
    """
    if where.lower().endswith(".parquet"):
        names, numbered = _parquet(data, where)
    else:
        # Bytes that are not UTF-8 make only their line bad: `clean_caption` refuses it.
        text = data.decode("utf-8-sig", errors="surrogateescape")
        of_text = _jsonl if where.lower().endswith(".jsonl") else _csv
        names, numbered = of_text(text, where)
    file = columns.choose(names, file, columns.FILE, "file", where)
    names.remove(file)
    caption = columns.choose(names, caption, columns.CAPTION, "caption", where)
    label = columns.optional(names, label, "label", where)
    rows: dict[str, tuple[object, object]] = {}
    for number, row in numbered:
        if not isinstance(row.get(file), str) or not row[file]:
            raise config.ConfigError(f"{where}, line {number}: no {file}")
        name = posixpath.normpath(row[file])
        if name in rows:
            raise config.ConfigError(
                f"{where}, line {number}: {name} occurs twice; keep one caption "
                "for each picture, or training and validation may share it"
            )
        rows[name] = row.get(caption), _label(row.get(label)) if label else None
    return rows


def _csv(text: str, where: str) -> tuple[list[str], list[tuple[int, dict]]]:
    """The names of the columns, as often as they are there, and (line, row)s."""
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as e:
        raise config.ConfigError(f"{where}, line {reader.line_num}: {e}") from e
    if not rows:
        raise config.ConfigError(f"{where}: no rows below its header line")
    for number, row in rows:
        if None in row:
            raise config.ConfigError(
                f"{where}, line {number}: more fields than the header line; put a "
                'caption with commas in quotes, "like, this"'
            )
    return list(reader.fieldnames or ()), rows


def _jsonl(text: str, where: str) -> tuple[list[str], list[tuple[int, dict]]]:
    """The names of all entries, and (line, object)s."""
    rows = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:  # the latter where it is nested
            raise config.ConfigError(f"{where}, line {number}: no JSON: {e}") from e
        if not isinstance(row, dict):
            raise config.ConfigError(f"{where}, line {number}: not an object")
        rows.append((number, row))
    if not rows:
        raise config.ConfigError(f"{where}: no rows")
    return list(dict.fromkeys(key for _, row in rows for key in row)), rows


def _label(value: object) -> object:
    """A label as it is; "" where there is none, which is a bad record."""
    return "" if value is None else value


def _parquet(data: bytes, where: str) -> tuple[list[str], list[tuple[int, dict]]]:
    """The names of the columns, as often as they are there, and (row, values)s."""
    parquet = _pyarrow_parquet()
    try:
        table = parquet.read_table(io.BytesIO(data))
        names = list(table.column_names)
        # The first of several columns of one name; `columns.choose` refuses to take it.
        columns_of = {n: table.column(names.index(n)).to_pylist() for n in names}
    except (OSError, ValueError) as e:  # pyarrow's errors are ValueErrors
        raise config.ConfigError(f"{where} cannot be read: {e}") from e
    if not table.num_rows:
        raise config.ConfigError(f"{where}: no rows")
    rows = ({n: columns_of[n][i] for n in names} for i in range(table.num_rows))
    return names, list(enumerate(rows, 1))


def _pyarrow_parquet() -> Any:
    try:
        from pyarrow import parquet
    except ImportError as e:
        raise config.ConfigError(
            "a .parquet table of captions is read with pyarrow, which is not "
            "installed; pip install 'scaling_ldm[huggingface]'"
        ) from e
    return parquet


def kind(head: bytes, name: str) -> str:
    """What a table of text has a column for besides files, by the usual names.

    Args:
      head: the beginning of a .csv, .tsv, .txt or .jsonl.

    Returns:
      "captions", "labels", or "" for a file that is no table of pictures.
    """
    first = head.decode("utf-8-sig", "replace").split("\n", 1)[0]
    ending = posixpath.splitext(name.lower())[1]
    between = {".csv": ",", ".tsv": "\t"}.get(ending) or max("\t|,", key=first.count)
    try:
        found = json.loads(first) if ending == ".jsonl" else None
        found = found or next(csv.reader([first], delimiter=between), [])
    except (ValueError, RecursionError, csv.Error):
        return ""
    usual = {str(key).strip().lower() for key in found}
    if not usual & {*columns.FILE, "image_name"}:
        return ""
    if usual & {*columns.CAPTION, "comment"}:
        return "captions"
    return "labels" if usual & {*columns.LABEL} else ""
