"""The load test at toy size: the stock client gets what is its own, and what is lost or mixed up is seen."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("openai")
import httpx
from openai import AsyncOpenAI

from bench import records, serving
from bench.serving import Answer, Asked, Task
from pe.integrations.openai_server import Limits, Served, build_app
from pe.method.requests import Instruction, Requests
from tests.embedders import build

TEXTS = [f"text {n} of the river" for n in range(8)]
MANY = Task(texts=TEXTS, instructions=["Find the same thing", "Find the kind"], request_texts=2)
ONE = Task(texts=TEXTS, instructions=[serving.PLAIN], request_texts=3)


@pytest.fixture(scope="module")
def model() -> Any:
    found = build("qwen3")
    found.instructions = {"query": serving.PLAIN}
    return found


def answers(model: Served, task: Task, clients: int, **limits: Any) -> list[Answer]:
    """What the clients get of the app in this process."""

    async def run() -> list[Answer]:
        app = build_app(model, "tiny", Limits(**limits))
        through = httpx.AsyncClient(transport=httpx.ASGITransport(app))
        async with (
            app.router.lifespan_context(app),
            AsyncOpenAI(base_url="http://tiny/v1", api_key="none", max_retries=0, http_client=through) as client,
        ):
            return await serving.drive(client, "tiny", task, task.queues(clients))

    return asyncio.run(run())


@pytest.mark.parametrize(("task", "clients", "requests"), [(ONE, 2, 3), (MANY, 2, 8)], ids=["one", "many"])
def test_the_stock_client_gets_what_is_its_own(model: Any, task: Task, clients: int, requests: int) -> None:
    alone = serving.direct(model, [ONE, MANY])
    expected = alone.expected[task is MANY]
    assert expected.shape == (len(task.instructions), 8, model.dimensions)
    assert np.allclose(expected[0], model.encode(TEXTS, instruction=task.instructions[0]), atol=2e-6)
    got = answers(model, task, clients)
    assert len(got) == requests
    lost, wrong, furthest = serving.check(got, expected)
    assert (lost, wrong) == (0, 0)
    assert furthest < 1e-5


def test_what_is_lost_or_mixed_up_is_counted(model: Any) -> None:
    alone = serving.direct(model, [ONE])
    refused = answers(model, ONE, 2, texts=2)
    assert [answer.embeddings is None for answer in sorted(refused)] == [True, True, False]
    assert serving.check(refused, alone.expected[0])[:2] == (2, 0)
    own = alone.expected[0]
    mixed = [Answer(Asked([0, 1]), own[0, [1, 0]], 0.1), Answer(Asked([2]), own[0, :2], 0.1)]
    assert serving.check(mixed, own)[:2] == (1, 2)


class Words:
    """What stands for a model of sentence-transformers: the length of a text, and what it is told of it."""

    max_seq_length = 0

    def get_embedding_dimension(self) -> int:
        return 1

    def tokenizer(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [0] * len(text)}

    def encode(self, texts: Sequence[str], **_: Any) -> Any:
        self.read = list(texts)
        return np.array([[len(text)] for text in texts], np.float32)


def test_a_peer_reads_the_instruction_before_the_text() -> None:
    wanted = [Instruction(serving.PLAIN), Instruction("Sort")]
    for instructed, head in ((True, "Instruct: Sort\nQuery:"), (False, "")):
        words = Words()
        peer = serving.Peer(words, 10, instructed=instructed)
        found = peer.encode_each(peer.tokenized(Requests(["a", "b"], wanted, [1, 0])))
        assert words.read == [f"{head}a", "b"]
        assert words.max_seq_length == 10 + len(head)
        assert found.tolist() == [[len(head) + 1], [1]]


def test_page_says_what_was_measured(tmp_path: Path) -> None:
    rounds = [
        {"requests": 2, "texts": 6, "rate": rate, "ms": ms, "cpu_ms": 9.0, "batches": 2, "busy": 0.9, "lost": lost,
         "wrong": 0, "furthest": 2e-3}
        for rate, ms, lost in ((10.0, [100.0, 200.0], 0), (20.0, [300.0, 1400.0], 1))
    ]  # fmt: skip
    sizes = {"request_texts": 3, "characters": 99.6, "max_length": 128, "backbone": "llama", "load": 2.04}
    common = {"recipe": "smollm2", "device": "cpu", "dtype": "bfloat16", "sizes": sizes, "system": "pe"}
    load = {"task": "load", "clients": 8, **serving.summed(rounds)}
    alone = {"task": "alone", "clients": 0, **serving.told(serving.Alone([], 2.0, 1.0), 40)}
    records.append("serving", [{**common, **load}, {**common, **alone}], tmp_path)
    text = serving.render(tmp_path)
    alone_row, row = text.splitlines()[4:6]
    assert alone_row == "| PE | no server | 20.0 |  |  | 25 |  |  |  |"
    assert row == "| PE | 8 | 15.0 | 250 | 1,367 | 9.0 | 3.0 | 90% | 1, 0 |"
    assert "3 texts a request, 100 characters in the mean, cut at 128 tokens; load average 2.0" in text
    assert "4 requests; an embedding was at most 0.002" in text
    assert "Not yet measured." in serving.render(tmp_path / "none")
