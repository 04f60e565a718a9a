"""Sort of the rows of a fleet with Ray Data, for all of its tasks."""

import json
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from adapters.training.execution.fit_client import FitRequest
from adapters.training.execution.fit_task import FitProcess
from adapters.training.sorted_rows import RowTable

# Column, of the rows that are sorted, with the index of each in the sorted rows.
_SORTED_INDEX = "sorted_index"


class SortedRows(NamedTuple):
    """Blocks with the sorted rows of a share of a fleet."""

    begin: int
    end: int
    """Both as in `ShareRows`."""
    blocks: list[tuple[int, Any]]
    """Sorted index of the first row of each block, and the reference to the block."""


class RowSorter:
    """Actor that sorts the rows of a fleet by group with Ray Data, and owns the sorted blocks.

    Blocks that exceed the object stores of the nodes are on the disks of the nodes. Ray Data does not work through Ray
    Client, which is why it runs in an actor.
    """

    def sort(self, process: str, request: bytes, share_count: int) -> list[SortedRows]:
        """Return the blocks of each share."""
        import ray.data

        table, context = row_table(process, request), ray.data.DataContext.get_current()
        context.enable_progress_bars, context.execution_options.preserve_order = False, True
        # What replaces the error of a read loses it on its way here.
        context.raise_original_map_exception = True
        # Each block stays one, so that its number says which rows are in it.
        context.target_max_block_size = None
        rows, sorted_index_N, K = np.arange(table.rows), table.sorted_index(), table.block_rows
        firsts = range(0, table.rows, K)
        unsorted = [
            pa.table({"row": rows[first : first + K], _SORTED_INDEX: sorted_index_N[first : first + K]})
            for first in firsts
        ]
        read = partial(_read_block, process=process, request=request)
        dataset = ray.data.from_arrow(unsorted).map_batches(read, batch_format="pyarrow", batch_size=None)
        dataset = dataset.sort(_SORTED_INDEX, boundaries=[*firsts[1:]]).materialize()
        refs = [block.ref for bundle in dataset.iter_internal_ref_bundles() for block in bundle.blocks]
        blocks = [*zip(firsts, refs, strict=True)]
        return [
            SortedRows(begin, end, blocks[table.share_blocks(begin, end)]) for begin, end in table.shares(share_count)
        ]


def row_table(process: str, request: bytes) -> RowTable:
    """Open the rows of a fleet on this node; raise what `RowTable` raises."""
    blobs = FitProcess.from_json(process).blobs_here().open()
    return RowTable(blobs, FitRequest.from_json(json.loads(request)).data)


def _read_block(block: pa.Table, *, process: str, request: bytes) -> pa.Table:
    """Return the rows of a block by their numbers, which are consecutive, with the sorted index of each."""
    first, last = block["row"][0].as_py(), block["row"][-1].as_py()
    return row_table(process, request).read(first, last + 1).append_column(_SORTED_INDEX, block[_SORTED_INDEX])
