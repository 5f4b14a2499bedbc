"""hdf5_view: what an HDF5 file holds, as a dictionary (`describe`) and as a tree on the terminal (`render`); follows no link out of the file."""
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from hpcfl.errors import DataError, JobError
from hpcfl.files.hdf5 import explain_foreign
from hpcfl.wording import byte_text, cause_text, printable_text

BLOCK_BYTES = 16 << 20                                             # statistics read a dataset in pieces of this size, so memory stays small
SHOWN = 8                                                          # values of an attribute, or strings of a long dataset, that are shown
WHOLE = 20                                                         # a row of so many values is shown whole
DEPTH = 64                                                         # groups deeper than this are named but not opened: a description is recursive


def describe(path: str | Path, summarise: bool = True) -> dict[str, Any]:
    """What an HDF5 file holds, with nothing in it that JSON cannot carry.

    A group is {kind: "group", attributes, members: {name: node}}; a dataset {kind: "dataset", shape, type, bytes, stored_bytes, compression,
    attributes, statistics}, with values if it is a short row of numbers; anything that leads elsewhere {kind: "refused", reason}: soft and external links,
    datasets kept in other files.
    Statistics are {min, mean, max, missing} over the finite values, `missing` counting NaN and infinity; strings show the first few as `first`.
    With `summarise=False` no dataset is read.

    Raises: JobError for a path that is no file, DataError for a file that is not HDF5 or is truncated.
    """
    path = Path(path)
    if not path.is_file():
        hint = f"; did you mean {path / 'metrics.h5'}?" if (path / "metrics.h5").is_file() else ""
        raise JobError(f"{path}: {'is a folder' if path.is_dir() else 'no such file'}, wanted an HDF5 file{hint}")
    try:
        with h5py.File(path, "r", locking=False) as file:
            root = _group(file, {}, summarise)
    except (OSError, RuntimeError, KeyError) as error:
        raise DataError(f"{path}: not a readable HDF5 file, perhaps truncated or still being written ({cause_text(error)})") from None
    return {"file": str(path), "file_bytes": path.stat().st_size, **root}


def render(description: dict[str, Any]) -> str:
    """The tree view of a description, one line per group, dataset and attribute."""
    lines = [f"{printable_text(description['file'])}  {byte_text(description['file_bytes'])}", *_lines(description, "")]
    return "\n".join(lines)


def _group(group: h5py.Group, seen: dict[Any, str], summarise: bool, depth: int = 0) -> dict[str, Any]:
    seen[_address(group)] = group.name
    return {"kind": "group", "attributes": _attributes(group),
            "members": {name: _member(group, name, seen, summarise, depth) for name in group}}


def _member(parent: h5py.Group, name: str, seen: dict[Any, str], summarise: bool, depth: int) -> dict[str, Any]:
    reason = explain_foreign(parent, name)
    if reason is None and parent.get(name, getclass=True) is h5py.Datatype:
        reason = "named type, holds no data"
    if reason is None and _address(parent[name]) in seen:
        reason = f"the same object as {seen[_address(parent[name])]}"
    if reason is None and depth >= DEPTH:
        reason = f"deeper than {DEPTH} groups"
    if reason is not None:
        return {"kind": "refused", "reason": reason}
    child = parent[name]
    if isinstance(child, h5py.Group):
        return _group(child, seen, summarise, depth + 1)
    seen[_address(child)] = child.name
    return _dataset(child, summarise)


def _address(thing: h5py.Group | h5py.Dataset) -> int:
    return h5py.h5o.get_info(thing.id).addr


def _dataset(dataset: h5py.Dataset, summarise: bool) -> dict[str, Any]:
    is_text = h5py.check_string_dtype(dataset.dtype) is not None
    node = {"kind": "dataset", "shape": None if dataset.shape is None else list(dataset.shape), "type": "str" if is_text else str(dataset.dtype),
            "bytes": int(dataset.nbytes), "stored_bytes": int(dataset.id.get_storage_size()), "compression": dataset.compression,
            "attributes": _attributes(dataset)}
    if summarise and dataset.size:
        try:
            is_number, is_short = dataset.dtype.kind in "biuf", dataset.ndim == 1 and dataset.size <= WHOLE
            node |= {"first": _first(dataset)} if is_text else {"statistics": _statistics(dataset)} if is_number else {}
            node |= {"values": [_to_plain(value) for value in dataset[()]]} if is_number and is_short else {}
        except (OSError, RuntimeError) as error:
            node["fault"] = f"cannot be read: {cause_text(error)}"      # a damaged dataset must not hide the others
    return node


def _attributes(thing: h5py.Group | h5py.Dataset) -> dict[str, Any]:
    return {name: _to_plain(thing.attrs[name]) for name in thing.attrs}


def _to_plain(value: Any) -> Any:
    if isinstance(value, np.ndarray) and value.size > SHOWN:
        return [*(_to_plain(item) for item in value.ravel()[:SHOWN]), f"and {value.size - SHOWN} more"]
    if isinstance(value, (np.ndarray, np.generic)):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_to_plain(item) for item in value]
    if isinstance(value, bytes):
        return value.decode(errors="replace")
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, (str, bool, int, float)) else repr(value)


def _first(dataset: h5py.Dataset) -> list[str]:
    if dataset.ndim == 0:
        return [_to_plain(dataset[()])]
    block = dataset[tuple([slice(WHOLE if dataset.size <= WHOLE else SHOWN)] + [slice(1)] * (dataset.ndim - 1))]
    return [_to_plain(item) for item in block.ravel()]


def _statistics(dataset: h5py.Dataset) -> dict[str, Any]:
    low, high, total, finite, missing = math.inf, -math.inf, 0.0, 0, 0
    for block in _blocks(dataset):
        kept = block[np.isfinite(block)] if block.dtype.kind == "f" else block.ravel()
        missing += block.size - kept.size
        if kept.size:
            low, high = min(low, kept.min().item()), max(high, kept.max().item())
            total, finite = total + float(kept.sum(dtype=np.float64)), finite + kept.size
    found = {"min": low, "mean": total / finite, "max": high} if finite else {"min": None, "mean": None, "max": None}
    return {**found, "missing": missing}


def _blocks(dataset: h5py.Dataset) -> Iterator[np.ndarray]:
    if dataset.ndim == 0:
        yield np.asarray(dataset[()])
        return
    rows = max(1, BLOCK_BYTES // max(1, dataset.nbytes // dataset.shape[0]))
    for start in range(0, dataset.shape[0], rows):
        yield dataset[start:start + rows]


def _lines(node: dict[str, Any], indent: str) -> Iterator[str]:
    attributes: list[tuple[str, str, dict[str, Any]]] = [(f"@{printable_text(name)}", f"= {_attribute_text(value)}", {})
                                                     for name, value in node["attributes"].items()]
    members = [(printable_text(name) + "/" * (child["kind"] == "group"), _summary(child), child) for name, child in node.get("members", {}).items()]
    width = max((len(name) for name, text, _ in attributes + members if text), default=0)
    entries = attributes + members
    for index, (name, text, child) in enumerate(entries):
        is_last = index == len(entries) - 1
        yield f"{indent}{'└─ ' if is_last else '├─ '}" + (f"{name:<{width}}  {text}" if text else name)
        if child.get("kind") in ("group", "dataset"):
            yield from _lines(child, indent + ("   " if is_last else "│  "))


def _attribute_text(value: Any) -> str:
    if isinstance(value, str):
        lines = value.strip().splitlines()
        return f'"{printable_text(value)}"' if len(value) <= 100 and len(lines) <= 1 else f"text of {len(lines)} lines, {len(value)} characters"
    return printable_text(str(value))


def _summary(node: dict[str, Any]) -> str:
    if node["kind"] != "dataset":
        return f"-> {printable_text(node['reason'])}; not followed" if node["kind"] == "refused" else ""
    shape = "empty" if node["shape"] is None else "scalar" if not node["shape"] else "(" + " x ".join(map(str, node["shape"])) + ")"
    size = byte_text(node["bytes"]) + (f" ({byte_text(node['stored_bytes'])} stored, {node['compression']})" if node["compression"] else "")
    return "  ".join(part for part in (shape, node["type"], size, _values(node)) if part)


def _values(node: dict[str, Any]) -> str:
    if "fault" in node:
        return printable_text(node["fault"])
    if "first" in node:
        texts = list(dict.fromkeys(f'"{printable_text(text)[:40]}"' for text in node["first"]))
        return ", ".join(texts) + (", ..." if math.prod(node["shape"]) > len(node["first"]) else "")
    if "values" in node:
        return ", ".join(f"{value:.4g}" if isinstance(value, float) else str(value) for value in node["values"])
    found = node.get("statistics")
    if not found:
        return ""
    missing = f", {found['missing']} not finite" if found["missing"] else ""
    return "no finite value" if found["min"] is None else f"min {found['min']:.4g}, mean {found['mean']:.4g}, max {found['max']:.4g}{missing}"
