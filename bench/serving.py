"""`python -m bench.serving [--recipe recipes/smollm2-135m.yaml] [--clients 1 8 64] [--rounds 2] ...`

Load on the server of `pe.serve` from the stock client of OpenAI: an untrained embedder of the recipe, and
sentence-transformers behind the same server, over the same backbone with mean pooling, and as all-MiniLM-L6-v2
(`python -m pe.models minilm`). Each server is a process of its own; rounds go from one to the next.

1. A client sends its next request, some texts of real lengths, when it has the answer to its last. No text comes twice
   in a round. Clients try once: whatever is no answer counts as lost.
2. Every embedding is compared with what the model gives for that text without a server.
3. *Instructions*: eight clients ask for the same documents at once, each under an instruction of its own.

Legend: I instructions, N texts, D embedding size.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import multiprocessing
import os
import signal
import socket
import statistics
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil
import torch
import uvicorn
from openai import AsyncOpenAI, OpenAIError
from prometheus_client.parser import text_string_to_metric_families
from transformers import AutoConfig

from bench import records
from bench.cases import ROOT
from bench.encoding import SentenceEncoder, sample
from bench.markdown import NOT_YET, gpu_line, grid, where
from bench.records import Record
from bench.systems import frozen_dtype
from pe.baselines.common import INSTRUCT
from pe.config import ModelConfig
from pe.integrations.openai_server import Limits, Served, build_app
from pe.method.backbone import Backbone
from pe.method.encoder import Floats
from pe.method.loading import quiet
from pe.method.requests import Instruction, Requests, Truncation
from pe.model import PromptEmbedder
from pe.runs.recipes import load_recipe

PLAIN = "Embed the text"
"""What every server embeds under by default; the peers read nothing before a text for it."""
INSTRUCTIONS = tuple(f"Given a medical question, retrieve passages that answer it, in form {n}" for n in range(8))
MINILM = ROOT / "models" / "minilm"
DOCUMENTS = 8
LEAST_REQUESTS = 12
LIMITS = Limits(seconds=900.0)
FAR = 0.05
"""Between an embedding, of length one, and that of the same text among others: more than bfloat16 rounds."""


class Asked(NamedTuple):
    """Places of the texts of one request, and of its instruction."""

    texts: list[int]
    instruction: int = 0


class Answer(NamedTuple):
    """Embeddings `[N, D]` of a request, None where none came, and the seconds that it took."""

    asked: Asked
    embeddings: Floats | None
    seconds: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Task:
    """Texts under instructions, how many at a time are asked for, and how many requests a client has in the mean."""

    texts: Sequence[str]
    instructions: Sequence[str]
    request_texts: int
    requests_each: int = 1

    def requests(self, most: int | None = None, instruction: int = 0) -> list[Asked]:
        """All texts under one instruction, or the first `most` requests for them."""
        firsts = range(0, len(self.texts), self.request_texts)[:most]
        return [Asked([*range(len(self.texts))[first : first + self.request_texts]], instruction) for first in firsts]

    def queues(self, clients: int) -> list[Iterator[Asked]]:
        """For each client what it asks for: its own instruction's requests, or whichever is next of one queue."""
        if len(self.instructions) > 1:
            return [iter(self.requests(instruction=place)) for place in range(len(self.instructions))]
        return [iter(self.requests(round_of(clients, self.requests_each)))] * clients


def round_of(clients: int, each: int) -> int:
    """Requests of a round: enough for a time to be told where the clients are few."""
    return max(LEAST_REQUESTS, each * clients)


class Peer:
    """sentence-transformers as the server takes an embedder; it counts no tokens, for which it would tokenise twice."""

    def __init__(self, model: Any, max_length: int, *, instructed: bool) -> None:
        """Take over a model; `instructed` puts every instruction but `PLAIN` before each text."""
        self.model, self.max_length, self.instructed = model, max_length, instructed
        self.instructions = {"query": PLAIN}
        self.truncation = Truncation()
        self.dimensions = int(model.get_embedding_dimension())

    def head(self, instruction: str) -> str:
        is_read = self.instructed and instruction != PLAIN
        return INSTRUCT.replace("{instruction}", instruction).removesuffix("{text}") if is_read else ""

    def tokenized(self, requests: Requests) -> Requests:
        return dataclasses.replace(requests, read=[()] * len(requests.texts))

    def encode_each(self, requests: Requests) -> Floats:
        """`[N, D]`, in batches of 32 sorted by length; an instruction does not count as part of a text."""
        heads = [self.head(item.text) for item in requests.instructions]
        extra = max(len(self.model.tokenizer(head, add_special_tokens=False)["input_ids"]) for head in heads)
        self.model.max_seq_length = self.max_length + extra
        texts = [heads[index] + text for text, index in zip(requests.texts, requests.index, strict=True)]
        return self.model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


def ours(config: ModelConfig, device: torch.device) -> PromptEmbedder:
    """An untrained embedder: what it computes takes as long as a trained one's."""
    model = PromptEmbedder.from_config(config, device).eval()
    model.start([Instruction(text) for text in (PLAIN, *INSTRUCTIONS)])
    model.instructions = {"query": PLAIN}
    return model


def same_backbone(config: ModelConfig, device: torch.device) -> Peer:
    sentences = SentenceEncoder(config, Backbone.from_pretrained(config.backbone, device))
    return Peer(sentences.model, config.max_length, instructed=True)


def minilm(config: ModelConfig, device: torch.device) -> Peer:
    """As its users load it, in float32, but cut at the recipe's length; it was trained without instructions."""
    from sentence_transformers import SentenceTransformer

    return Peer(SentenceTransformer(str(MINILM), device=str(device)), config.max_length, instructed=False)


SYSTEMS: Mapping[str, Callable[[ModelConfig, torch.device], Served]] = {
    "pe": ours,
    "st": same_backbone,
    "minilm": minilm,
}
TITLES = {
    "pe": "PE",
    "st": "sentence-transformers, same backbone",
    "minilm": "sentence-transformers, all-MiniLM-L6-v2",
}


class Alone(NamedTuple):
    """What a model gives without a server: embeddings `[I, N, D]` of each task, and seconds of the first."""

    expected: list[Floats]
    seconds: float
    cpu_seconds: float


def direct(model: Served, tasks: Sequence[Task]) -> Alone:
    """Embed the texts of all tasks, in batches as large as the server's."""

    def embed(task: Task) -> Floats:
        requests = [(instruction, text) for instruction in task.instructions for text in task.texts]
        parts = []
        for first in range(0, len(requests), LIMITS.batch_texts):
            asked, texts = zip(*requests[first : first + LIMITS.batch_texts], strict=True)
            wanted = list(dict.fromkeys(asked))
            given = Requests(texts, [Instruction(text) for text in wanted], [wanted.index(text) for text in asked])
            parts.append(model.encode_each(model.tokenized(given)))
        return np.concatenate(parts).reshape(len(task.instructions), len(task.texts), -1)

    model.encode_each(model.tokenized(Requests(tasks[0].texts[:8], [Instruction(PLAIN)], [0] * 8)))
    began, cpu_began = time.perf_counter(), time.process_time()
    first = embed(tasks[0])
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu_began
    return Alone([first, *map(embed, tasks[1:])], seconds, cpu_seconds)


def told(alone: Alone, texts: int) -> Record:
    """What a record says of a model without a server."""
    cpu_ms = round(1000 * alone.cpu_seconds / texts, 3)
    return {"texts": texts, "texts_per_second": {"median": round(texts / alone.seconds, 3)}, "cpu_ms": cpu_ms}


def serve(name: str, config: ModelConfig, device: str, tasks: Sequence[Task], ready: Connection) -> None:
    """Send what the model gives alone and the port, then serve until the process is ended."""
    quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # uvicorn sends itself what ended it, as its last act
    model = SYSTEMS[name](config, torch.device(device))
    alone = direct(model, tasks)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        ready.send((alone, listening.getsockname()[1]))
        server = uvicorn.Server(uvicorn.Config(build_app(model, name, LIMITS), log_level="warning"))
        server.run(sockets=[listening])


@dataclasses.dataclass(frozen=True)
class Server:
    """A server that runs, and what its model gives without one."""

    name: str
    process: psutil.Process
    url: str
    alone: Alone

    def cpu_seconds(self) -> float:
        used = self.process.cpu_times()
        return used.user + used.system

    def counted(self) -> Record:
        """Batches so far, their texts and their seconds."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            families = text_string_to_metric_families(answer.read().decode())
            found = {sample.name: sample.value for family in families for sample in family.samples}
        return {"batches": found["pe_batch_texts_count"], "seconds": found["pe_batch_seconds_sum"]}


@contextlib.contextmanager
def running(name: str, config: ModelConfig, device: str, tasks: Sequence[Task]) -> Iterator[Server]:
    """A server in a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=serve, args=(name, config, device, tasks, theirs), daemon=True)
    process.start()
    theirs.close()
    try:
        alone, port = ours.recv()
        yield Server(name, psutil.Process(process.pid), f"http://127.0.0.1:{port}", alone)
    finally:
        process.terminate()
        process.join()


async def drive(client: AsyncOpenAI, model: str, task: Task, queues: Sequence[Iterator[Asked]]) -> list[Answer]:
    """Have a client for each queue ask for what is in it, one request after another."""

    async def work(queue: Iterator[Asked]) -> list[Answer]:
        answers = []
        for asked in queue:
            instruction, embeddings = task.instructions[asked.instruction], None
            began = time.perf_counter()
            with contextlib.suppress(OpenAIError):
                given = await client.embeddings.create(
                    model=model,
                    input=[task.texts[place] for place in asked.texts],
                    extra_body={} if instruction == PLAIN else {"instruction": instruction},
                )
                embeddings = np.array([item.embedding for item in given.data], np.float32)
            answers.append(Answer(asked, embeddings, time.perf_counter() - began))
        return answers

    return [*itertools.chain.from_iterable(await asyncio.gather(*map(work, queues)))]


class Checked(NamedTuple):
    """Requests without an answer, texts whose embedding is not theirs, and the furthest that one was from its own."""

    lost: int
    wrong: int
    furthest: float


def check(answers: Sequence[Answer], expected: Floats) -> Checked:
    """Compare answers with the embeddings `[I, N, D]` of all texts without a server.

    An embedding is wrong where it is `FAR` from its text's, or nearer to another text's under that instruction.
    """
    lost, wrong, furthest = 0, 0, 0.0
    for asked, embeddings, _ in answers:
        if embeddings is None or len(embeddings) != len(asked.texts):
            lost += 1
            continue
        apart = np.linalg.norm(embeddings[:, None] - expected[asked.instruction], axis=-1)
        own = apart[range(len(asked.texts)), asked.texts]
        wrong += int(((own > FAR) | (own > apart.min(1))).sum())
        furthest = max(furthest, float(own.max()))
    return Checked(lost, wrong, furthest)


def phase(server: Server, task: Task, place: int, clients: int) -> Record:
    """One round of a task from so many clients."""

    async def run() -> tuple[list[Answer], float]:
        url = f"{server.url}/v1"
        async with AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=LIMITS.seconds) as client:
            began = time.perf_counter()
            answers = await drive(client, server.name, task, task.queues(clients))
            return answers, time.perf_counter() - began

    before, cpu_before = server.counted(), server.cpu_seconds()
    answers, seconds = asyncio.run(run())
    after, cpu_seconds = server.counted(), server.cpu_seconds() - cpu_before
    texts = sum(len(answer.asked.texts) for answer in answers)
    return {
        "requests": len(answers),
        "texts": texts,
        "rate": texts / seconds,
        "ms": [1000 * answer.seconds for answer in answers],
        "cpu_ms": 1000 * cpu_seconds / texts,
        "batches": int(after["batches"] - before["batches"]),
        "busy": (after["seconds"] - before["seconds"]) / seconds,
        **check(answers, server.alone.expected[place])._asdict(),
    }


def summed(rounds: Sequence[Record]) -> Record:
    """The rounds of one system under one number of clients."""
    ms = [ms for found in rounds for ms in found["ms"]]
    mean = {name: round(statistics.fmean(found[name] for found in rounds), 3) for name in ("cpu_ms", "busy")}
    return {
        "rounds": len(rounds),
        "requests": sum(found["requests"] for found in rounds),
        "texts": sum(found["texts"] for found in rounds),
        "batches": sum(found["batches"] for found in rounds),
        "texts_per_second": records.spread([found["rate"] for found in rounds]),
        "ms": {"p50": round(float(np.percentile(ms, 50)), 1), "p99": round(float(np.percentile(ms, 99)), 1)},
        **mean,
        "lost": sum(found["lost"] for found in rounds),
        "wrong": sum(found["wrong"] for found in rounds),
        "furthest": max(found["furthest"] for found in rounds),
    }


def measure(
    config: ModelConfig, systems: Sequence[str], tasks: Sequence[Task], clients: Sequence[int], rounds: int, device: str
) -> list[Record]:
    """Records of every system under every load; the first task is asked for by each number of clients."""
    loads = [(0, count) for count in clients] + [(n, len(task.instructions)) for n, task in enumerate(tasks) if n]
    found: dict[tuple[str, int, int], list[Record]] = {}
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(running(name, config, device, tasks)) for name in systems]
        for number in range(rounds):
            for n, count in loads:
                for place in range(len(servers)):
                    server = servers[(place + number) % len(servers)]
                    done = phase(server, tasks[n], n, count)
                    found.setdefault((server.name, n, count), []).append(done)
        alone = {server.name: server.alone for server in servers}
    return [
        *(
            {"system": name, "task": "alone", "clients": 0, **told(it, len(tasks[0].texts))}
            for name, it in alone.items()
        ),
        *(
            {"system": name, "task": "instructions" if n else "load", "clients": clients, **summed(of_it)}
            for (name, n, clients), of_it in found.items()
        ),
    ]


def milliseconds(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def table(found: Sequence[Record]) -> str:
    """A row for each system and number of clients."""
    rows = []
    for record in found:
        rate, cpu = record["texts_per_second"]["median"], milliseconds(record["cpu_ms"])
        row = [TITLES[record["system"]]]
        if record["task"] == "alone":
            rows.append([*row, "no server", f"{rate:,.1f}", "", "", cpu, "", "", ""])
            continue
        clients = f"{record['clients']}{', each its instruction' if record['task'] == 'instructions' else ''}"
        ms = [milliseconds(record["ms"][name]) for name in ("p50", "p99")]
        batch = f"{record['texts'] / record['batches']:.1f}"
        faults = f"{record['lost']}, {record['wrong']}"
        rows.append([*row, clients, f"{rate:,.1f}", *ms, cpu, batch, f"{record['busy']:.0%}", faults])
    titles = ["", "clients", "texts/s", "p50 ms", "p99 ms", "server's CPU ms a text", "texts a batch", "busy"]
    return grid([*titles, "lost, wrong"], rows)


def render(folder: Path) -> str:
    """The newest run of each recipe on each device."""
    parts = []
    for found in records.newest("serving", ("recipe", "device"), folder):
        first = found[0]
        sizes = first["sizes"]
        texts = f"{sizes['request_texts']} texts a request, {sizes['characters']:.0f} characters in the mean"
        heading = f"**{first['recipe']}, {first['device']}** ({sizes['backbone']}; {texts}, cut at"
        heading += f" {sizes['max_length']} tokens; load average {sizes['load']:.1f} when it began)"
        order = sorted(found, key=lambda r: (r["task"] == "instructions", [*TITLES].index(r["system"]), r["clients"]))
        furthest = max(record.get("furthest", 0.0) for record in found)
        sent = sum(record.get("requests", 0) for record in found)
        told = f"{sent:,} requests; an embedding was at most {furthest:.1g} from what its model gives without a server."
        parts += [heading, table(order), told, f"{where(first)}."]
    return "\n\n".join([*(parts or [NOT_YET]), *gpu_line("serving", folder)])


def tasks_of(clients: Sequence[int], texts: int, each: int) -> list[Task]:
    """Texts enough for the most clients, and documents under several instructions; none comes twice in a task."""
    wanted = texts * round_of(max(clients), each)
    drawn = list(dict.fromkeys(sample(2 * wanted, "all")))[:wanted]
    documents = list(dict.fromkeys(sample(2 * DOCUMENTS, "documents")))[:DOCUMENTS]
    return [
        Task(texts=drawn, instructions=[PLAIN], request_texts=texts, requests_each=each),
        Task(texts=documents, instructions=INSTRUCTIONS, request_texts=texts),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "smollm2-135m.yaml")
    options.add_argument("--systems", nargs="+", choices=SYSTEMS, default=list(SYSTEMS))
    options.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    options.add_argument("--texts", type=int, default=3, help="of a request")
    options.add_argument("--requests", type=int, default=2, help="of a client in a round, in the mean")
    options.add_argument("--rounds", type=int, default=2)
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options.add_argument("--dry", action="store_true", help="print only, add no records")
    given = options.parse_args(argv)
    quiet()
    config, load = load_recipe(given.recipe).model, os.getloadavg()[0]
    tasks = tasks_of(given.clients, given.texts, given.requests)
    found = measure(config, given.systems, tasks, given.clients, given.rounds, given.device)
    shape = AutoConfig.from_pretrained(
        config.backbone.model, revision=config.backbone.revision, trust_remote_code=False
    )
    common = {
        "recipe": given.recipe.stem,
        "device": torch.device(given.device).type,
        "dtype": frozen_dtype(config.backbone, torch.device(given.device)),
        "sizes": {
            "max_length": config.max_length,
            "request_texts": given.texts,
            "characters": statistics.fmean(map(len, tasks[0].texts)),
            "instructions": len(INSTRUCTIONS),
            "load": round(load, 1),
            "soft_tokens": config.prompter.soft_tokens,
            "backbone": f"{shape.model_type}, {shape.num_hidden_layers} layers, width {shape.hidden_size}",
        },
    }
    if not given.dry:
        records.append("serving", [{**common, **record} for record in found])
    print(table(found))


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # by way of what ends the servers
    main()
