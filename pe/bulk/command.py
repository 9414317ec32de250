"""What `python -m pe.encode` does where OUTPUT is a folder: options checked, engine and workers chosen, a last line."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast, get_args

from pe.bulk.columns import Stored
from pe.bulk.engines import Engine, EngineName, Workers, check_workers, has_gpus, on_ray, on_this_process, start_ray
from pe.bulk.job import SHARD_ROWS, encode_to_shards
from pe.bulk.shard import Embedding
from pe.config import Dtype
from pe.data.instructions import default_instruction
from pe.method.loading import usable_device
from pe.model import Side
from pe.saving import find, summary


def encode_folder(
    model: str,
    input: str,
    output: str,
    *,
    instructions: Sequence[str] | None,
    side: Side,
    field: str,
    dimensions: int | None,
    precision: str,
    batch_tokens: int,
    backbone: str | None,
    prompter: str | None,
    dtype: Dtype | None,
    device: str | None,
    overwrite: bool,
    engine: EngineName = "local",
    workers: int | None = None,
    worker_cores: int | None = None,
    worker_gpus: float | None = None,
    shard_rows: int | None = None,
) -> None:
    """Embed the texts of files into the shards of a folder; what is finished there is not done again.

    Args:
        model, instructions, side, field, dimensions, batch_tokens, backbone, prompter, dtype: see `Embedding`; where
            there are no instructions, the side's default.
        input, output, overwrite: see `encode_to_shards`.
        precision: float32, float16, or int8 with a scale a row.
        device: of `local`: cpu, cuda, cuda:1; a GPU where there is one.
        engine: local, one process, or ray, a cluster of any number.
        workers: of ray, how many; as many as its nodes hold.
        worker_cores: of each; 1.
        worker_gpus: of each, up to 1; 1 where the cluster has any.
        shard_rows: rows of a shard.

    Raises:
        OSError, ValueError: an option that has no use here, or that cannot be; see `encode_to_shards`.
    """
    if precision not in get_args(Stored):
        raise ValueError(f"--precision: expected {', '.join(get_args(Stored))} for a folder, got {precision}")
    for name, given in {"batch_tokens": batch_tokens, "shard_rows": shard_rows, "worker_cores": worker_cores}.items():
        if given is not None and given < 1:
            raise ValueError(f"--{name}: expected at least 1, got {given}")
    if worker_gpus is not None and not 0 <= worker_gpus <= 1:
        raise ValueError(f"--worker_gpus: expected 0 to 1, since an embedder runs on one GPU, got {worker_gpus:g}")
    saved = summary(find(Path(model), None))
    if dimensions is not None and not 1 <= dimensions <= (saved.dimensions or dimensions):
        raise ValueError(f"--dimensions: expected 1 to {saved.dimensions}, the model's, got {dimensions}")
    if instructions is None:
        default = default_instruction(saved.instructions, side)
        if default is None:
            raise ValueError(f"--instruction: expected a sentence, got none, and {model} has no default")
        print(f"no --instruction, so {side} texts go under {default!r}", file=sys.stderr)
        instructions = [default]
    run, each = chosen(engine, workers, worker_cores, worker_gpus, device)
    options = Embedding(
        model=anywhere(model),
        instructions=tuple(instructions),
        side=side,
        field=field,
        dimensions=dimensions,
        precision=cast(Stored, precision),
        batch_tokens=batch_tokens,
        backbone=backbone and anywhere(backbone),
        prompter=prompter and anywhere(prompter),
        dtype=dtype,
        device=("cuda" if each.gpus else "cpu") if engine == "ray" else str(usable_device(device)),
        threads=each.cores if engine == "ray" else None,
    )
    size = shard_rows or SHARD_ROWS
    said = encode_to_shards(
        input, output, options, saved, engine=run, workers=each, shard_rows=size, overwrite=overwrite
    )
    print(said, file=sys.stderr)


def chosen(
    engine: EngineName, workers: int | None, cores: int | None, gpus: float | None, device: str | None
) -> tuple[Engine, Workers]:
    """The engine of that name, and its workers.

    Raises:
        ValueError: options of the other engine; Ray is not installed; its nodes do not hold the workers.
    """
    if engine == "local":
        given: dict[str, Any] = {"workers": workers, "worker_cores": cores, "worker_gpus": gpus}
        if name := next((name for name, value in given.items() if value is not None), None):
            raise ValueError(f"--{name}: expected none without --engine ray, got {given[name]}")
        return on_this_process, Workers()
    if device is not None:
        raise ValueError(f"--device: expected none with --engine ray, whose workers have --worker_gpus, got {device!r}")
    start_ray()
    each = Workers(count=workers, cores=cores or 1, gpus=float(has_gpus()) if gpus is None else gpus)
    check_workers(each)
    return on_ray, each


def anywhere(name: str) -> str:
    """The whole path of a model that is here, else its name: workers have another working directory."""
    return str(Path(name).absolute()) if Path(name).exists() else name
