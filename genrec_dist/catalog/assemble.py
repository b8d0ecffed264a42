"""Raw shards -> kept, indexed, ordered interactions and one metadata row an item; the ledger on the way.

Order of the steps: bad rows out, unknown items, the bad-fraction threshold, duplicate pairs, k-core, indices,
order. Vectorised over whole columns. Reads the shards, writes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from genrec_dist.artifacts.ledger import Ledger
from genrec_dist.catalog.ingest import read_shards
from genrec_dist.catalog.kcore import kcore
from genrec_dist.config import CatalogConfig
from genrec_dist.errors import DataError

METADATA = ("title", "brand", "categories", "description", "price")


@dataclass
class Interactions:
    """Interactions as columns.

    Shapes:
        user, item: (n,) int codes into user_ids and item_ids.
        timestamp, position: (n,) int64; meaningless where has_timestamp / has_position is False.
        file, line: (n,) place of the row in the input.
    """

    user_ids: pa.Array
    item_ids: pa.Array
    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    has_timestamp: np.ndarray
    position: np.ndarray
    has_position: np.ndarray
    file: np.ndarray
    line: np.ndarray

    def __len__(self) -> int:
        return len(self.user)

    def take(self, rows: np.ndarray) -> Interactions:
        """The rows chosen by a mask or by numbers."""
        columns = {name: value[rows] for name, value in vars(self).items() if isinstance(value, np.ndarray)}
        return Interactions(self.user_ids, self.item_ids, **columns)


@dataclass
class Assembled:
    """What the artifact is written from.

    Shapes:
        user, item: (n,) final indices, sorted by user, then in the configured order.
        timestamp: (n,) int64 seconds; has_timestamp: (n,) bool.
        user_ids: (num_users,) strings; items: num_items rows of item_id and metadata.
    """

    user: np.ndarray
    item: np.ndarray
    timestamp: np.ndarray
    has_timestamp: np.ndarray
    user_ids: pa.Array
    items: pa.Table
    counts: dict = field(default_factory=dict)


def assemble(config: CatalogConfig, shards: dict[str, Path], names: dict[str, list[str]], ledger: Ledger) -> Assembled:
    """Filter, index and order everything.

    Args:
        config: the catalog section.
        shards: folder of the raw shards by role.
        names: what the ledger calls the input files, by role.
        ledger: receives every row that is dropped or stands out.

    Raises:
        DataError: too many bad rows, nothing left, or no complete order.
    """
    metadata, metadata_counts = _load_metadata(shards["items"], names["items"], ledger)
    data, counts = _load_interactions(shards["interactions"], names["interactions"], ledger)
    sources = names["interactions"]

    known_row = _rows_of(data.item_ids, metadata["item_id"])
    unknown = known_row[data.item] < 0
    action = "kept" if config.unknown_items == "keep" else "dropped"
    _record(ledger, sources, data.take(unknown), "unknown_item", action)
    counts["unknown_item"] = int(unknown.sum())
    if config.unknown_items == "drop":
        data = data.take(~unknown)
        counts["bad_rows"] += counts["unknown_item"]
    _check_fraction("metadata", metadata_counts, config, names["items"], ledger)
    _check_fraction("interactions", counts, config, sources, ledger)

    ordered_by = _ordering(data, config.order)
    if config.duplicates == "first":
        repeated = _repeats(data, ordered_by)
        _record(ledger, sources, data.take(repeated), "duplicate_pair", "dropped")
        counts["duplicate_pair"] = int(repeated.sum())
        data = data.take(~repeated)

    keep, rounds = kcore(data.user, data.item, config.min_user_interactions, config.min_item_interactions)
    counts |= {"kcore_rounds": rounds, "kcore_dropped": int((~keep).sum()), "ordered_by": ordered_by}
    data = data.take(keep)
    if not len(data):
        raise DataError(
            "no interaction is left",
            where="catalog",
            got=f"{counts['input_rows']} rows read, {counts}",
            expected="at least one user and item above the k-core thresholds",
            fix="lower catalog.min_user_interactions and catalog.min_item_interactions, or check the input",
        )
    out = _index(data, ordered_by, metadata, known_row)
    described = np.unique(known_row[data.item])
    metadata_counts["items_without_interactions"] = len(metadata) - int((described >= 0).sum())
    metadata_counts["items_without_metadata"] = len(out.items) - int((described >= 0).sum())
    out.counts = {"interactions": counts, "metadata": metadata_counts}
    return out


def _split_bad(table: pa.Table, names: list[str], ledger: Ledger) -> tuple[pa.Table, dict]:
    """Good rows of a table, and its counts; the bad rows go to the ledger."""
    good = pc.is_null(table["reason"])
    bad = table.filter(pc.invert(good)).select(["file", "line", "reason", "detail"])
    by_reason = {row["values"]: row["counts"] for row in pc.value_counts(bad["reason"]).to_pylist()}
    counts = {"input_rows": len(table), "bad_rows": len(bad), "bad_by_reason": dict(sorted(by_reason.items()))}
    room = max(0, ledger.max_rows - len(ledger.rows))
    for row in bad.slice(0, room).to_pylist():
        ledger.add(names[row["file"]], row["line"], row["reason"], "dropped", row["detail"] or "")
    for row in pc.value_counts(bad.slice(room)["reason"]).to_pylist():
        ledger.counts[(row["values"], "dropped")] += row["counts"]
    return table.filter(good), counts


def _record(ledger: Ledger, names: list[str], rows: Interactions, reason: str, action: str) -> None:
    """Put interactions into the ledger: listed while there is room, counted in any case."""
    room = max(0, ledger.max_rows - len(ledger.rows))
    users = rows.user_ids.take(pa.array(rows.user[:room])).to_pylist()
    items = rows.item_ids.take(pa.array(rows.item[:room])).to_pylist()
    for file, line, user, item in zip(rows.file[:room].tolist(), rows.line[:room].tolist(), users, items):
        ledger.add(names[file], line, reason, action, f"user {user}, item {item}")
    if len(rows) > room:
        ledger.counts[(reason, action)] += len(rows) - room


def _load_metadata(shards: Path, names: list[str], ledger: Ledger) -> tuple[pa.Table, dict]:
    """One metadata row an item id: the first one. Later ones go to the ledger as equal or conflicting."""
    table, counts = _split_bad(read_shards(shards, "items"), names, ledger)
    codes = table["item_id"].combine_chunks().dictionary_encode().indices.to_numpy()
    _, first = np.unique(codes, return_index=True)  # codes count up in order of first appearance
    is_first = np.zeros(len(codes), dtype=bool)
    is_first[first] = True
    later = np.flatnonzero(~is_first)
    same = _same_metadata(table.take(later), table.take(first[codes[later]]))
    for row, equal in zip(table.take(later).select(["file", "line", "item_id"]).to_pylist(), same.tolist()):
        reason = "duplicate_item" if equal else "conflicting_metadata"
        ledger.add(names[row["file"]], row["line"], reason, "dropped", f"item {row['item_id']}")
    counts |= {"duplicate_item": int(same.sum()), "conflicting_metadata": int((~same).sum())}
    return table.filter(pa.array(is_first)).select(["item_id", *METADATA]), counts


def _same_metadata(a: pa.Table, b: pa.Table) -> np.ndarray:
    same = np.ones(len(a), dtype=bool)
    for name in METADATA:
        left, right = (t[name].combine_chunks() for t in (a, b))
        if pa.types.is_list(left.type):
            left, right = pc.binary_join(left, "\x1f"), pc.binary_join(right, "\x1f")
        both_null = pc.and_(pc.is_null(left), pc.is_null(right))
        equal = pc.or_(pc.fill_null(pc.equal(left, right), False), both_null)
        same &= equal.to_numpy(zero_copy_only=False)
    return same


def _load_interactions(shards: Path, names: list[str], ledger: Ledger) -> tuple[Interactions, dict]:
    table, counts = _split_bad(read_shards(shards, "interactions", ("user_id", "item_id")), names, ledger)
    if not counts["input_rows"]:
        raise DataError("the interactions are empty", where=", ".join(names), expected="at least one row")
    (users, user), (items, item) = _codes(table["user_id"]), _codes(table["item_id"])
    stamps, positions = table["timestamp"], table["position"]
    data = Interactions(
        user_ids=users,
        item_ids=items,
        user=user,
        item=item,
        timestamp=pc.fill_null(stamps, 0).to_numpy(),
        has_timestamp=pc.is_valid(stamps).to_numpy(),
        position=pc.fill_null(positions, 0).to_numpy(),
        has_position=pc.is_valid(positions).to_numpy(),
        file=table["file"].to_numpy(),
        line=table["line"].to_numpy(),
    )
    return data, counts


def _codes(column: pa.ChunkedArray) -> tuple[pa.Array, np.ndarray]:
    """(sorted distinct values, code of each row): a code is the rank of its string."""
    array = column.combine_chunks()
    order = pc.sort_indices(array.dictionary).to_numpy()
    rank = np.empty(len(order), dtype=np.int32)
    rank[order] = np.arange(len(order), dtype=np.int32)
    return array.dictionary.take(pa.array(order)), rank[array.indices.to_numpy()]


def _rows_of(values: pa.Array | pa.ChunkedArray, table_ids: pa.ChunkedArray) -> np.ndarray:
    """Row of each value in a column of distinct ids, -1 when absent."""
    return pc.fill_null(pc.index_in(values, value_set=table_ids.combine_chunks()), -1).to_numpy()


def _check_fraction(role: str, counts: dict, config: CatalogConfig, names: list[str], ledger: Ledger) -> None:
    total, bad = counts["input_rows"], counts["bad_rows"]
    limit = config.max_bad_fraction
    # A cut-off file is one bad row however much of it is missing, so no fraction can excuse it.
    cut_off = counts["bad_by_reason"].get("truncated_gzip", 0) and not config.allow_truncated
    if bad <= limit * total and not cut_off:
        return
    reasons = dict(counts["bad_by_reason"])
    if bad > sum(reasons.values()):
        reasons["unknown_item"] = bad - sum(reasons.values())
    places = [row for row in ledger.rows if row["source"] in names and row["reason"] in reasons]
    first = [f"{row['source']}:{row['line']} {row['reason']} {row['detail']}".strip() for row in places[:5]]
    raise DataError(
        f"a compressed file of the {role} is cut off" if cut_off else f"too many bad rows in the {role}",
        where="; ".join(first),
        got=f"{bad} of {total} rows: " + ", ".join(f"{reason} {n}" for reason, n in sorted(reasons.items())),
        expected=f"at most {limit:.2%} (catalog.max_bad_fraction)",
        fix="fetch the file again, or set catalog.allow_truncated=true"
        if cut_off
        else "mend the input, choose the right catalog.source, or raise catalog.max_bad_fraction",
    )


def _ordering(data: Interactions, order: str) -> str:
    """What the stored order goes by: a complete position, else a complete timestamp, else only the item."""
    if data.has_position.all():
        return "position"
    if data.has_timestamp.all():
        return "timestamp"
    if order == "file":
        return "item"  # what timestamps there are only decide which of two duplicates came first
    raise DataError(
        "interactions cannot be put into time order",
        where="catalog.order",
        got=f"{int((~data.has_timestamp).sum())} of {len(data)} rows without a timestamp, "
        f"{int((~data.has_position).sum())} without a position",
        expected="every row with a position, or every row with a timestamp",
        fix="complete one of the two columns, or set catalog.order=file",
    )


def _time_keys(data: Interactions, ordered_by: str) -> tuple[np.ndarray, ...]:
    """Sort keys of the time order within a user, least important first (as np.lexsort wants them)."""
    stamp = np.where(data.has_timestamp, data.timestamp, np.iinfo(np.int64).max)
    keys = (data.line, data.file, data.item, stamp)
    return (*keys, data.position) if ordered_by == "position" else keys


def _repeats(data: Interactions, ordered_by: str) -> np.ndarray:
    """True for every interaction of a (user, item) pair but its earliest."""
    order = np.lexsort((*_time_keys(data, ordered_by), data.item, data.user))
    user, item = data.user[order], data.item[order]
    repeated = np.zeros(len(data), dtype=bool)
    repeated[order[1:]] = (user[1:] == user[:-1]) & (item[1:] == item[:-1])
    return repeated


def _index(data: Interactions, ordered_by: str, metadata: pa.Table, known: np.ndarray) -> Assembled:
    """Number users and items by the rank of their ids and sort the interactions."""
    kept_users, user = np.unique(data.user, return_inverse=True)
    kept_items, item = np.unique(data.item, return_inverse=True)
    keys = _time_keys(data, ordered_by)
    order = np.lexsort((*keys, data.item, data.user) if ordered_by == "item" else (*keys, data.user))
    row = known[kept_items]
    items = metadata.take(pa.array(row, mask=row < 0))  # without metadata: every column null
    items = items.set_column(0, "item_id", data.item_ids.take(pa.array(kept_items)))
    return Assembled(
        user=user[order].astype(np.int32),
        item=item[order].astype(np.int32),
        timestamp=data.timestamp[order],
        has_timestamp=data.has_timestamp[order],
        user_ids=data.user_ids.take(pa.array(kept_users)),
        items=items,
    )
