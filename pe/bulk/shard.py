"""One shard: its rows, block by block, through the embedder into a parquet file.

Legend: I instructions, N rows of a block, D numbers of an embedding.
"""

from __future__ import annotations

from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from pe.bulk.columns import Stored, column_names, shortened, stored, stored_fields
from pe.bulk.folder import Finished, Shard, ShardFolder
from pe.bulk.rows import blocks
from pe.config import Dtype
from pe.method.loading import quiet, usable_device
from pe.model import PromptEmbedder, Side


@dataclass(frozen=True, kw_only=True)
class Embedding:
    """How texts are embedded, and by what.

    Attributes:
        model: folder of a saved PromptEmbedder, or its name on the hub.
        instructions: one or several, which share the text pass.
        side: whose templates are used.
        field: the column of the texts.
        dimensions: the first numbers that stay, of length one again; None: all.
        precision: how an embedding stands in its column.
        batch_tokens: tokens of a packed batch.
        backbone, prompter, dtype: see `PromptEmbedder.from_pretrained`.
        device: where it runs.
        threads: of the processor; None: as torch has it.
    """

    model: str
    instructions: tuple[str, ...]
    side: Side
    field: str
    dimensions: int | None
    precision: Stored
    batch_tokens: int
    backbone: str | None
    prompter: str | None
    dtype: Dtype | None
    device: str
    threads: int | None

    def written(self, schema: pa.Schema, width: int) -> pa.Schema:
        """The columns of a shard: those of the input, then embeddings of a model of this width."""
        size = width if self.dimensions is None else self.dimensions
        fields = stored_fields(column_names(self.instructions), self.precision, size)
        return pa.schema([*schema, *fields])


class ShardEncoder:
    """Holds one embedder, and encodes one shard after another."""

    def __init__(self, options: Embedding, schema: pa.Schema, folder: str) -> None:
        """Load the embedder.

        Args:
            options: how to embed.
            schema: the input's columns.
            folder: where shards go.

        Raises:
            OSError, ValueError: see `PromptEmbedder.from_pretrained`; a device that cannot be used.
        """
        quiet()
        if options.threads is not None:
            torch.set_num_threads(options.threads)
        self.options, self.schema, self.folder = options, schema, ShardFolder(folder)
        self.embedder = PromptEmbedder.from_pretrained(
            options.model,
            backbone=options.backbone,
            prompter=options.prompter,
            dtype=options.dtype,
            device=usable_device(options.device),
        )

    def __call__(self, shard: Shard) -> Finished:
        """Write a shard, whole or not at all.

        Raises:
            DataError: its rows cannot be read.
        """
        before = self.embedder.truncation.cut
        schema = self.options.written(self.schema, self.embedder.dimensions)
        repeats = self.options.precision == "int8"  # a dictionary of floats is as long as they are
        with (
            self.folder.written(shard.name) as file,
            pq.ParquetWriter(file, schema, compression="zstd", use_dictionary=repeats) as writer,
        ):
            for block in blocks(shard.file, shard.cut, self.options.field, self.schema):
                writer.write_table(pa.table([*block.columns, *self._embedded(block)], schema=schema))
        truncated = self.embedder.truncation.cut - before
        return Finished(shard.name, shard.cut.rows, self.folder.size(shard.name), truncated)

    def _embedded(self, block: pa.Table) -> list[pa.Array]:
        """The columns of the embeddings `[I, N, D]` of a block."""
        options = self.options
        embeddings = self.embedder.encode_many(
            block[options.field].to_pylist(),
            instructions=options.instructions,
            side=options.side,
            batch_tokens=options.batch_tokens,
        )
        cut = shortened(embeddings, options.dimensions)
        return [column for rows in cut for column in stored(rows, options.precision)]
