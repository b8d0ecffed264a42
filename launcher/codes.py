"""Item codes from the command line: giving codes to items that came after the tree was built."""

from __future__ import annotations

import shutil
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from genrec_dist.errors import ConfigError
from genrec_dist.runs import RunFolder
from launcher.embeddings import embeddings_folder, new_folder


def extend(source: str, embeddings: str, out: Path, skip: int, stage: str, runs: str | Path, console: Console) -> None:
    """Write codes of old and new items to `out`, and say how many changed.

    Raises:
        ConfigError: no such run or folder, or nothing to add.
        DataError: embeddings that do not fit the tree, or more items than free codes.
    """
    from genrec_dist.artifacts.files import write_json
    from genrec_dist.artifacts.reader import EmbeddingStore
    from genrec_dist.identifiers import tree, trie

    folder = Path(source)
    if not (folder / trie.FILE).is_file():
        folder = RunFolder.existing(runs, source).artifact("identifiers")
    splits, codes = tree.Splits.load(folder), trie.Trie.load(folder)
    store = EmbeddingStore(embeddings_folder(embeddings, stage, runs))
    if skip >= store.num_items:
        raise ConfigError(
            "no row is left after those to skip",
            where="--skip",
            got=skip,
            expected=f"fewer than the {store.num_items} rows of {store.folder}",
        )
    with new_folder(out, "extended", folder.name) as building:
        found = tree.extend_codes(splits, codes, store.rows(range(skip, store.num_items)))
        trie.build_trie(found.codes, found.depth).save(building)
        for name in (tree.FILE, tree.CENTROIDS):  # so that it can be extended again
            shutil.copyfile(folder / name, building / name)
        write_json(building / "extension.json", found.report)
    report = found.report
    console.print(
        f"wrote {escape(str(out))}: {report['old_items']:,} items and {report['new_items']:,} new ones; "
        f"{report['changed']:,} codes changed; {report['off_nearest_path']:,} new items are not below the nearest "
        f"clusters, which were full; {report['free_codes_after']:,} codes are free",
        soft_wrap=True,
    )
