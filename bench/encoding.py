"""`python -m bench.encoding [--sources all documents] [--texts N] [--max-length L] [--instructions 1 10 100] ...`

Encoding of real texts on one frozen backbone: sentence-transformers (mean pooling, its own batches sorted by length,
the best of several batch sizes) against the packed backbone and untrained embedders of the recipe; and what more
instructions over the same texts cost. The suffix layout shares its text pass among them, the others encode again.

Texts are drawn from the files of a source in proportion to the number of their texts, the same for every run.
Instructions are new in every round, so that writing their prompts is part of the time. Before anything is timed,
sentence-transformers and the packed backbone have to read the same tokens and agree on their embeddings.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import random
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bench import records
from bench.cases import ROOT
from bench.markdown import NOT_YET, gpu_line, grid, where
from bench.records import Record
from pe.baselines.common import INSTRUCT
from pe.baselines.frozen import FrozenEncoder
from pe.config import ModelConfig
from pe.data.records import read_jsonl
from pe.method.backbone import Backbone
from pe.method.encoder import Floats
from pe.method.loading import quiet
from pe.method.probes import PROBE_TOLERANCE
from pe.method.quantized import has_eight_bits
from pe.model import PromptEmbedder
from pe.runs.recipes import load_recipe

Files = Mapping[str, Sequence[str]]
"""Of each file the fields whose texts are read."""
DOCUMENTS: Files = {"data/eval/medquad/corpus.jsonl.xz": ["text"]}
SENTENCES: Files = {
    "data/eval/stsb_test.jsonl.xz": ["sentence1", "sentence2"],
    "data/eval/banking77_test.jsonl.xz": ["text"],
}
SOURCES: Mapping[str, Files] = {"all": {**DOCUMENTS, **SENTENCES}, "documents": DOCUMENTS}
TEXTS = {"all": 1500, "documents": 400}
"""Of each source: about as many tokens, a quarter of an hour on two cores."""
BATCH_SIZES = (8, 16, 32, 64, 128)
TITLES = {
    "st": "sentence-transformers",
    "st-instructed": "sentence-transformers, instruction before each text",
    "frozen": "frozen backbone, packed",
    "pe-suffix": "PE, suffix",
    "pe-suffix-int8": "PE, suffix, texts read in int8",
    "pe-prefix": "PE, prefix",
}
SHARES_TEXTS = "pe-suffix"
UNREAD = "Embed the text"  # an encoder of bare texts reads no instruction
REENCODE_UP_TO = 10  # instructions: beyond, systems that read the texts again for each are not measured

Encode = Callable[[Sequence[str], Sequence[str]], Any]
"""Embeds texts under each of some instructions."""


class SentenceEncoder:
    """sentence-transformers with mean pooling over a backbone's checkpoint, in that backbone's type and device."""

    def __init__(self, config: ModelConfig, backbone: Backbone) -> None:
        from sentence_transformers import SentenceTransformer
        from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

        revision = {"revision": config.backbone.revision, "trust_remote_code": False}
        decoder = Transformer(
            config.backbone.model,
            max_seq_length=config.max_length,
            model_kwargs={**revision, "dtype": backbone.dtype},
            config_kwargs=revision,
            processor_kwargs=revision,
        )
        self.model = SentenceTransformer(modules=[decoder, Pooling(backbone.hidden_size)], device=str(backbone.device))
        self.max_length = config.max_length

    def tokenize(self, texts: Sequence[str]) -> list[list[int]]:
        """What it reads of each text, without padding."""
        found = []
        for text in texts:
            read = self.model.preprocess([text])
            found.append(read["input_ids"][0][read["attention_mask"][0].bool()].tolist())
        return found

    def encode(self, texts: Sequence[str], batch_size: int, before: str = "") -> Floats:
        """Normalised embeddings `[N, D]` of the texts behind `before`, which does not count as part of a text."""
        extra = len(self.tokenize([before])[0]) if before else 0
        self.model.max_seq_length = self.max_length + extra
        read = [before + text for text in texts]
        return self.model.encode(read, batch_size=batch_size, normalize_embeddings=True, show_progress_bar=False)

    def best_batch_size(self, texts: Sequence[str]) -> int:
        """The fastest of `BATCH_SIZES`."""
        spent = {}
        for size in BATCH_SIZES:
            started = time.perf_counter()
            self.encode(texts, size)
            spent[size] = time.perf_counter() - started
        return min(spent, key=lambda size: spent[size])


def sample(count: int, source: str = "all") -> list[str]:
    """That many texts of all the source's texts together, the same at every call."""
    texts = [
        row[key] for file, keys in SOURCES[source].items() for row in read_jsonl(ROOT / file, keys) for key in keys
    ]
    return random.Random(0).sample(texts, min(count, len(texts)))


def check_agreement(sentences: SentenceEncoder, frozen: FrozenEncoder, texts: Sequence[str]) -> list[int]:
    """Tokens of each text.

    Raises:
        RuntimeError: sentence-transformers and the packed backbone read other tokens, or embed them otherwise.
    """
    ids = [row[: frozen.max_length] for row in frozen.backbone.text_tokenizer(texts)]
    for text, ours, theirs in zip(texts, ids, sentences.tokenize(texts), strict=True):
        if ours != theirs:
            raise RuntimeError(f"{text[:80]!r}: expected the tokens {ours[:20]}, got {theirs[:20]}")
    expected, tolerance = frozen.encode(texts, instruction=UNREAD), PROBE_TOLERANCE[frozen.backbone.dtype]
    difference = float(np.abs(expected - sentences.encode(texts, BATCH_SIZES[0])).max())
    if not difference <= tolerance:
        raise RuntimeError(f"embeddings: expected a difference of at most {tolerance:g}, got {difference:g}")
    return [len(row) for row in ids]


def suffix(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, layout="suffix", pooling="mean_prompt")


def suffix_int8(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(suffix(config), backbone=dataclasses.replace(config.backbone, quantize="int8"))


def prefix(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, layout="prefix", pooling="mean_text", reader="none", skip="none", lens_rank=0)


LAYOUTS = {"pe-suffix": suffix, "pe-suffix-int8": suffix_int8, "pe-prefix": prefix}


def systems(
    config: ModelConfig, sentences: SentenceEncoder, frozen: FrozenEncoder, batch_size: int
) -> dict[str, Encode]:
    """Every system that the device can run, under the name its records carry."""
    device = frozen.backbone.device
    layouts = {name: layout(config) for name, layout in LAYOUTS.items()}
    if not has_eight_bits("int8", device):
        del layouts["pe-suffix-int8"]
    embedders = {name: PromptEmbedder.from_config(own, device) for name, own in layouts.items()}

    def instructed(texts: Sequence[str], wanted: Sequence[str]) -> list[Floats]:
        heads = [INSTRUCT.replace("{instruction}", text).removesuffix("{text}") for text in wanted]
        return [sentences.encode(texts, batch_size, head) for head in heads]

    return {
        "st": lambda texts, _: sentences.encode(texts, batch_size),
        "st-instructed": instructed,
        "frozen": lambda texts, _: frozen.encode(texts, instruction=UNREAD),
        **{name: functools.partial(in_our_way, own) for name, own in embedders.items()},
    }


def in_our_way(embedder: PromptEmbedder, texts: Sequence[str], wanted: Sequence[str]) -> Any:
    """Embeddings of the texts under each instruction."""
    return embedder.encode_many(texts, instructions=wanted)


def instructions(count: int, run: int) -> list[str]:
    """Instructions that no other run has."""
    return [f"Given a question, retrieve passages that answer it, in form {run}-{n}" for n in range(count)]


def time_calls(
    encoders: Mapping[str, Encode], texts: Sequence[str], counts: Sequence[int], rounds: int
) -> dict[tuple[str, int], list[float]]:
    """Milliseconds of each round by (system, number of instructions).

    What encodes again for each instruction is measured once with several, and so is what shares the texts beyond
    `REENCODE_UP_TO` instructions.
    """
    wanted = [(name, 1) for name in encoders]
    for count in (count for count in counts if count > 1):
        several = ("st-instructed", "pe-prefix") if count <= REENCODE_UP_TO else ()
        wanted += [(name, count) for name in (*several, SHARES_TEXTS)]
    times: dict[tuple[str, int], list[float]] = {key: [] for key in wanted}
    for number in range(rounds):
        for place in range(len(wanted)):
            name, count = wanted[(place + number) % len(wanted)]
            often = count == 1 or (name == SHARES_TEXTS and count <= REENCODE_UP_TO)
            if number and not often:
                continue
            asked = instructions(count, 1 + number)
            started = time.perf_counter()
            encoders[name](texts, asked)
            times[name, count].append(1000 * (time.perf_counter() - started))
    return times


def measure(
    config: ModelConfig, texts: Sequence[str], counts: Sequence[int], rounds: int, device: torch.device
) -> list[Record]:
    """Records of all systems, the first of them sentence-transformers."""
    frozen = FrozenEncoder.from_config(config.backbone, device, max_length=config.max_length)
    sentences = SentenceEncoder(config, frozen.backbone)
    lengths = check_agreement(sentences, frozen, texts)
    batch_size = sentences.best_batch_size(texts)
    encoders = systems(config, sentences, frozen, batch_size)
    for encode in encoders.values():
        encode(texts[:32], instructions(1, 0))
    shape = frozen.backbone.model.config
    common = {
        "mode": "encode",
        "device": device.type,
        "dtype": str(frozen.backbone.dtype).removeprefix("torch."),
        "texts": len(texts),
        "tokens": sum(lengths),
        "sizes": {
            "max_length": config.max_length,
            "longest": max(lengths),
            "soft_tokens": config.prompter.soft_tokens,
            "reader": config.reader,
            "batch_size": batch_size,
            "backbone": f"{shape.model_type}, {shape.num_hidden_layers} layers, width {shape.hidden_size}",
        },
    }
    return [
        {**common, "system": name, "instructions": count, "rounds": len(spent), "ms": records.spread(spent)}
        for (name, count), spent in time_calls(encoders, texts, counts, rounds).items()
    ]


def throughput(found: Sequence[Record]) -> str:
    """Texts and tokens a second under one instruction."""
    rows, base = [], next(record["ms"]["median"] for record in found if record["system"] == "st")
    for record in (record for record in found if record["instructions"] == 1):
        seconds = record["ms"]["median"] / 1000
        rates = [f"{record[name] / seconds:,.0f}" for name in ("texts", "tokens")]
        rows.append([TITLES[record["system"]], *rates, f"{base / record['ms']['median']:.2f}"])
    return grid(["", "texts/s", "tokens/s", "times sentence-transformers"], rows)


def repeated(found: Sequence[Record]) -> str:
    """Seconds of several instructions over the same texts, and the multiple of one instruction."""
    seconds = {(r["system"], r["instructions"]): r["ms"]["median"] / 1000 for r in found}
    counts = sorted({count for _, count in seconds})
    rows = []
    for name in (name for name in TITLES if any(system == name and count > 1 for system, count in seconds)):
        one = seconds[name, 1]
        at = [seconds.get((name, count)) for count in counts]
        cells = ["-" if spent is None else f"{spent:,.1f} s ({spent / one:.2f})" for spent in at]
        rows.append([TITLES[name], *cells])
    return grid(["", *(f"{count} instructions" if count > 1 else "1 instruction" for count in counts)], rows)


def render(folder: Path) -> str:
    """Throughput, and the cost of further instructions, of the newest run on each device."""
    parts = []
    for found in records.newest("encoding", ("recipe", "device", "dtype", "source"), folder):
        first = found[0]
        sizes, mean = first["sizes"], first["tokens"] / first["texts"]
        texts = f"{first['texts']:,} texts, {mean:.0f} tokens in the mean, cut at {sizes['max_length']}"
        ours = f"{sizes['soft_tokens']} soft tokens, reader: {sizes['reader']}"
        heading = f"**{first['recipe']}, {first['device']}, {first['source']}** ({sizes['backbone']}; {texts}; {ours};"
        heading += f" sentence-transformers in batches of {sizes['batch_size']})"
        parts += [heading, throughput(found), repeated(found), f"{where(first)}."]
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("encoding", folder)])


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "tiny.yaml")
    options.add_argument("--sources", nargs="+", choices=SOURCES, default=list(SOURCES))
    options.add_argument("--texts", type=int, help=f"of each source (default: {TEXTS})")
    options.add_argument("--max-length", type=int, default=512, help="tokens of a text; longer ones are cut")
    options.add_argument("--instructions", type=int, nargs="+", default=[1, 10, 100])
    options.add_argument("--rounds", type=int, default=3)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dry", action="store_true", help="print only, add no records")
    arguments = options.parse_args(argv)
    quiet()
    config = dataclasses.replace(load_recipe(arguments.recipe).model, max_length=arguments.max_length)
    device = torch.device(arguments.device)
    for source in arguments.sources:
        texts = sample(arguments.texts or TEXTS[source], source)
        found = measure(config, texts, arguments.instructions, arguments.rounds, device)
        found = [{"recipe": arguments.recipe.stem, "source": source, **record} for record in found]
        if not arguments.dry:
            records.append("encoding", found)
        print(source, throughput(found), repeated(found), sep="\n\n")


if __name__ == "__main__":
    main()
