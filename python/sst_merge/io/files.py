"""Data files of the kinds that people have, as records: JSONL, JSON arrays, CSV and TSV, parquet, all of them gzipped too, and folders.

What a file is, its first bytes say where they can (gzip, parquet, JSON), its name otherwise. Parquet needs pyarrow, folders written by
`datasets.Dataset.save_to_disk` need datasets: both come with `pip install "sst-kernels[files]"`.
"""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DataError
from .forms import FIELDS
from .paths import expanded

_MOST = 2**31  # bytes that a gzipped file may expand to
_SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
_LISTS = ("data", "rows", "examples", "instances", "train")  # names under which a JSON object holds its rows
_OTHERS = {
    b"PK\x03\x04": "a zip archive (or an Excel sheet): unpack it, or save the sheet as CSV",
    b"BZh": "compressed by bzip2: unpack it",
    b"\xfd7zXZ": "compressed by xz: unpack it",
    b"\x28\xb5\x2f\xfd": "compressed by zstd: unpack it",
    b"ARROW1": "an Arrow file: save it as parquet",
    b"\x80\x04": "a pickle, which can run code: save the data as JSONL",
    b"\x80\x05": "a pickle, which can run code: save the data as JSONL",
    b"SQLite": "a database: export the table as CSV",
}


@dataclass(frozen=True)
class Record:
    """One row: its number (line, or position from 1), how errors name it, and what it holds or why that cannot be read."""

    number: int
    where: str
    value: Any = None
    error: DataError | None = None


@dataclass(frozen=True)
class Source:
    """An open data file: `kind` ("JSONL", "CSV", …), the SHA-256 of its bytes, and its records in order."""

    path: str
    kind: str
    sha256: str
    records: Iterator[Record]


def open_source(path: str | Path) -> Source:
    """Find out what a data file or folder is. DataError for what cannot be read, with what to do."""
    path = expanded(path)
    try:
        if path.is_dir():
            return _folder(path)
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
        reason = getattr(error, "strerror", None) or error
        hint = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)):
            hint = f"; of a data set on the Hugging Face hub, download the files: hf download {path} --repo-type dataset --local-dir data"
        raise DataError(
            f"{path}: cannot be read ({reason}); expected a data file: JSONL, JSON, CSV or parquet{hint}"
        ) from error
    kind, records = _records(path, raw)
    return Source(str(path), kind, hashlib.sha256(raw).hexdigest(), records)


def _records(path: Path, raw: bytes) -> tuple[str, Iterator[Record]]:
    name, packed = path.name.lower(), ""
    if raw[:2] == b"\x1f\x8b":
        raw, packed = _unzipped(path, raw), " (gzip)"
    name = name.removesuffix(".gz")
    for magic, what in _OTHERS.items():
        if raw.startswith(magic):
            raise DataError(f"{path}: is {what}")
    if raw.startswith(b"PAR1"):
        return "parquet" + packed, _parquet(path, raw)
    raw = raw.removeprefix(b"\xef\xbb\xbf")
    if name.endswith((".csv", ".tsv")):
        header, kind = raw.partition(b"\n")[0], "CSV" if name.endswith(".csv") else "TSV"
        by_country = ";" if b";" in header and b"," not in header else ","  # of the spreadsheet's language
        return kind + packed, _csv(path, raw, by_country if kind == "CSV" else "\t")
    if name.endswith(".parquet"):
        raise DataError(f"{path}: is no parquet file, whatever its name says; copy it again")
    whole = _array(path, raw)
    if whole is None:
        return "JSONL" + packed, _lines(path, raw)
    return "JSON" + packed, (Record(n, f"{path}: entry {n}", value) for n, value in enumerate(whole, 1))


def _lines(path: Path, raw: bytes) -> Iterator[Record]:
    for number, line in enumerate(raw.split(b"\n"), 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            yield Record(number, where, _parsed(line, where))
        except DataError as error:
            yield Record(number, where, error=error)


def _parsed(text: bytes, where: str) -> Any:
    try:
        return json.loads(text.decode())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 ({error.reason} at byte {error.start})") from error
    except json.JSONDecodeError as error:
        place = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno}, column {error.colno}"
        raise DataError(f"{where}: not JSON ({error.msg.removesuffix(' at')} at {place})") from error
    except RecursionError as error:
        raise DataError(f"{where}: not JSON that can be read (nested too deeply)") from error
    except ValueError as error:
        raise DataError(f"{where}: not JSON that can be read ({error})") from error


def _array(path: Path, raw: bytes) -> list[Any] | None:
    """The rows of a file that is one JSON value, None for JSONL: where the first line is a whole value, as far as that can be told."""
    text = raw.lstrip()
    if text[:1] not in (b"[", b"{"):
        return None
    first, _, rest = text.partition(b"\n")
    try:
        value = _parsed(first, "")
    except DataError:
        if text[:1] == b"{" and first.strip() != b"{":
            return None  # a spoiled line of JSONL, which is named by its number
        value = _parsed(text, str(path))
    else:
        if rest.strip():
            return None
    if isinstance(value, list):
        return value
    if isinstance(value, dict):
        known = not value.keys().isdisjoint(FIELDS)
        held = next((value[name] for name in _LISTS if isinstance(value.get(name), list) and not known), None)
        return held if held is not None else ([value] if rest.strip() else None)
    return None


def _csv(path: Path, raw: bytes, delimiter: str) -> Iterator[Record]:
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 ({error.reason}); save the sheet as CSV UTF-8") from error
    csv.field_size_limit(_MOST - 1)
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    line = 1
    while True:
        try:
            names = reader.fieldnames or ()
            line = reader.line_num + 1
            row = next(reader, None)
        except csv.Error as error:
            raise DataError(f"{path}:{line}: not CSV ({error})") from error
        if row is None:
            return
        where = f"{path}:{line}"
        if None in row or None in row.values():
            cells = sum(value is not None for key, value in row.items() if key is not None) + len(row.get(None) or ())
            torn = DataError(
                f"{where}: has {cells} cells under a header of {len(names)}; quote cells with {delimiter!r}"
            )
            yield Record(line, where, error=torn)
        else:
            yield Record(line, where, row)


def _parquet(path: Path, raw: bytes) -> Iterator[Record]:
    parquet = _needed("pyarrow.parquet", f"{path}: parquet files")
    try:
        table = parquet.read_table(io.BytesIO(raw))
    except (OSError, ValueError) as error:  # pyarrow's errors are of these kinds
        raise DataError(f"{path}: not a readable parquet file ({str(error).splitlines()[0]}); copy it again") from error
    return _rows(path, table.to_pylist())


def _rows(path: Path, rows: Any) -> Iterator[Record]:
    return (Record(n, f"{path}: row {n}", dict(row)) for n, row in enumerate(rows, 1))


def _folder(path: Path) -> Source:
    """A folder of `save_to_disk`, or one that holds the files of one split."""
    if (path / "dataset_dict.json").is_file():
        names = sorted(p.name for p in path.iterdir() if (p / "state.json").is_file())
        raise DataError(f"{path}: holds the splits {', '.join(names)}: give the folder of one of them")
    if (path / "state.json").is_file():
        datasets = _needed("datasets", f"{path}: folders of datasets.save_to_disk")
        try:
            rows = datasets.load_from_disk(str(path))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: not a readable folder of datasets.save_to_disk ({error})") from error
        return Source(str(path), "datasets folder", _sha256(sorted(path.glob("*.arrow"))), _rows(path, rows))
    files = sorted(p for p in path.rglob("*") if p.is_file() and p.name.lower().removesuffix(".gz").endswith(_SUFFIXES))
    files = [p for p in files if not any(part.startswith(".") for part in p.relative_to(path).parts)]
    splits: defaultdict[str, list[Path]] = defaultdict(list)
    for file in files:
        splits[_SHARD.sub("", str(file.relative_to(path)))].append(file)
    if len(splits) != 1:
        found = (
            f"{len(splits)} data files: {', '.join(list(splits)[:5])}; give one of them" if splits else "no data file"
        )
        raise DataError(
            f"{path}: is a folder that holds {found}; expected a file, a folder of one split, or one of datasets.save_to_disk"
        )
    parts = [_records(file, file.read_bytes()) for file in files]

    def numbered() -> Iterator[Record]:
        number = 0
        for _, records in parts:
            for record in records:
                number += 1
                yield Record(number, record.where, record.value, record.error)

    return Source(str(path), f"folder of {parts[0][0]}", _sha256(files), numbered())


def _sha256(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


def _unzipped(path: Path, raw: bytes) -> bytes:
    try:
        with gzip.GzipFile(fileobj=io.BytesIO(raw)) as file:
            out = file.read(_MOST + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: not a readable gzip file ({error}); copy it again") from error
    if len(out) > _MOST:
        raise DataError(f"{path}: expands to more than {_MOST / 2**30:.0f} GiB: split it")
    return out


def _needed(module: str, what: str) -> Any:
    import importlib

    load: Callable[[str], Any] = importlib.import_module
    try:
        return load(module)
    except ImportError as error:
        raise DataError(f'{what} need {module.split(".")[0]}: pip install "sst-kernels[files]"') from error
