"""Random reads of records beside other ways to keep them, and what resuming costs: ``python -m benchmarks.loader``.

Records have 1,100 to 4,300 random ids of 184,622; all files are in the page cache. Seconds are per record, but those of
``resume``, which are of a loader's first step.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from benchmarks.harness import Case, Options, case, interleave_measured, main, require, timed
from emulus.data.loader import Loader, ReadingConfig
from emulus.data.mixture import Mixture
from emulus.data.records import Record, Shard, ShardLine, Span, add_to_manifest, shard_name, write_shard
from emulus.data.tokens import SETTINGS
from emulus.files import write_json
from emulus.lazy import later
from emulus.tokenizer.text import TextTokenizer
from emulus.tokenizer.vocabulary import Vocabulary

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq
else:
    pa = later("pyarrow")
    pq = later("pyarrow.parquet")

Ids = npt.NDArray[np.uint32]
Other = Literal["mmap", "parquet"]

VOCABULARY = 184_622
GROUP = 64
"""Rows of a Parquet row group."""
ROW, ROWS = 8192, 4
"""Ids of a row, rows of a step."""
AROUND = [(1, 1), (21, 1), (1, 21)]
"""How many ids stand before and after a picture: BOS, EOS and perhaps the caption."""
SETTINGS_HERE = {
    "records": (4000, "records in the shard"),
    "step": (100_000, "how far the resumed run of `resume` is"),
}
TOY = {"records": 40, "step": 50}


def records(count: int) -> list[Record]:
    """Pictures with one caption of 20 ids; what the ids mean does not matter here."""
    draw = np.random.default_rng(0)
    found = []
    for number in range(count):
        size = int(draw.integers(1100, 4300))
        spans = (Span("caption", 0, 20), Span("media", 20, size))
        ids = draw.integers(0, VOCABULARY, size).astype(np.uint32)
        found.append(Record(id=f"picture/{number}", kind="image", ids=ids, spans=spans, shape=(30, 36)))
    return found


def folder_of(made: list[Record], folder: Path) -> Path:
    """A tokens folder with all records in one shard."""
    text = TextTokenizer.train(["a picture"], size=256)
    text.save(folder)
    Vocabulary.native(text_size=text.size, visual_size=VOCABULARY).save(folder / "vocabulary.json")
    path = folder / shard_name("train", "image", 0)
    add_to_manifest(folder, ShardLine(name=path.name, **vars(write_shard(path, made))))
    write_json(folder / SETTINGS, {})
    return folder


def by_mmap(made: list[Record], folder: Path) -> Callable[[int], Ids]:
    """A flat file of all ids, mapped into memory; where each record begins is known."""
    starts = np.cumsum([0, *(len(record.ids) for record in made)])
    path = folder / "flat.bin"
    np.concatenate([record.ids for record in made]).tofile(path)
    flat = np.memmap(path, np.uint32, "r")
    return lambda number: np.array(flat[starts[number] : starts[number + 1]])


def by_parquet(made: list[Record], folder: Path) -> Callable[[int], Ids]:
    """A Parquet file of lists; a row comes with its row group."""
    path = folder / "rows.parquet"
    table = pa.table({"ids": pa.array([record.ids for record in made], pa.list_(pa.uint32()))})
    pq.write_table(table, path, row_group_size=GROUP, compression="zstd", compression_level=1)
    file = pq.ParquetFile(path)

    def read(number: int) -> Ids:
        group, row = divmod(number, GROUP)
        column = file.read_row_group(group, columns=["ids"], use_threads=False).column(0)
        return np.array(column[row].values.to_numpy(), np.uint32)

    return read


def reads(other: Other, options: Options) -> Case:
    """Records in random order, one by one."""
    sizes = TOY if options.toy else options.settings
    made = records(sizes["records"])
    order = np.random.default_rng(1).permutation(len(made))
    # A row group is read for every row, so fewer rows tell enough.
    theirs = order[:: 20 if other == "parquet" else 1].tolist()
    with tempfile.TemporaryDirectory() as name:
        folder = folder_of(made, Path(name))
        read = {"mmap": by_mmap, "parquet": by_parquet}[other](made, folder)
        shard = Shard(folder / shard_name("train", "image", 0))
        for number in theirs:
            ours = shard.read([number])[0].ids
            same = np.array_equal(ours, made[number].ids) and np.array_equal(read(number), ours)
            require(same, f"record {number} is not what was written")

        def all_theirs() -> None:
            for number in theirs:
                read(number)

        def all_ours() -> None:
            for number in order.tolist():
                shard.read([number])

        timings = interleave_measured(
            lambda: timed(all_theirs, options.clock) / len(theirs),
            lambda: timed(all_ours, options.clock) / len(order),
            pairs=options.pairs,
        )
        size = shard.path.stat().st_size
    return _case(f"reads-{other}", timings, options, records=len(made), shard_bytes=size)


def rows(options: Options) -> Case:
    """The records alone, then whole rows of them: planned, read, joined, with targets and weights."""
    sizes = TOY if options.toy else options.settings
    made = records(sizes["records"])
    order = np.random.default_rng(1).permutation(len(made)).tolist()
    with tempfile.TemporaryDirectory() as name:
        mixture = Mixture.open([str(folder_of(made, Path(name)))])
        shard = Shard(Path(name) / shard_name("train", "image", 0))
        loader = _loader(mixture)
        _check_rows(loader, made)
        steps = max(len(made) // 16, 1)
        documents = sum(loader.read(step).documents for step in range(steps))

        def all_ours() -> None:
            for step in range(steps):
                loader.read(step)

        def all_theirs() -> None:
            for number in order:
                shard.read([number])

        timings = interleave_measured(
            lambda: timed(all_theirs, options.clock) / len(order),
            lambda: timed(all_ours, options.clock) / documents,
            pairs=options.pairs,
        )
    return _case("rows", timings, options, records=len(made), row_tokens=ROW, rows_per_step=ROWS)


def _loader(mixture: Mixture, state: dict[str, int] | None = None) -> Loader:
    return Loader(mixture, ReadingConfig(), seed=0, row_tokens=ROW, rows_per_step=ROWS, threads=0, state=state)


def _check_rows(loader: Loader, made: list[Record]) -> None:
    """Every document of a step is the ids of a record's spans between BOS and EOS."""
    known = {record.of("media")[0].tobytes() for record in made}
    for row in loader.read(0).rows:
        for document in np.split(row.input_ids.numpy().astype(np.uint32), np.cumsum(row.document_lengths)[:-1]):
            found = [document[before : len(document) - after].tobytes() for before, after in AROUND]
            require(any(media in known for media in found), "a document is none of the records")


def resume(options: Options) -> Case:
    """Opening a run's data at step 10, then far into it: to the first step's rows, from the saved state."""
    sizes = TOY if options.toy else options.settings
    made = records(sizes["records"])
    with tempfile.TemporaryDirectory() as name:
        mixture = Mixture.open([str(folder_of(made, Path(name)))])
        whole = _loader(mixture)
        early, late = whole.state(10), whole.state(sizes["step"])
        for state in (early, late):
            ours, expected = _loader(mixture, state).step(state["step"]), whole.read(state["step"])
            same = all(
                np.array_equal(a.input_ids.numpy(), b.input_ids.numpy())
                for a, b in zip(ours.rows, expected.rows, strict=True)
            )
            require(same, f"step {state['step']} of a resumed loader is another")

        def first(state: dict[str, int]) -> Any:
            return _loader(mixture, state).step(state["step"])

        timings = interleave_measured(
            lambda: timed(lambda: first(early), options.clock),
            lambda: timed(lambda: first(late), options.clock),
            pairs=options.pairs,
        )
        replay = timed(lambda: _loader(mixture).state(sizes["step"]), options.clock)
    about = {"step": sizes["step"], "records": len(made), "planning_all_steps_before_s": round(replay, 3)}
    return case("resume", timings, options, **about)


def _case(name: str, timings: Any, options: Options, **about: Any) -> Case:
    rates = {
        "baseline_per_s": round(1 / float(np.median(timings.baseline))),
        "ours_per_s": round(1 / float(np.median(timings.ours))),
    }
    return case(name, timings, options, **rates, **about)


CASES: dict[str, Callable[[Options], Case]] = {
    "reads-mmap": partial(reads, "mmap"),
    "reads-parquet": partial(reads, "parquet"),
    "rows": rows,
    "resume": resume,
}

if __name__ == "__main__":
    raise SystemExit(main(CASES, settings=SETTINGS_HERE))
