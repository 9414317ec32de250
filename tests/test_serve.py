"""The server of `/v1/embeddings`: what comes out is what `encode` gives, limits hold, nothing is lost."""

from __future__ import annotations

import asyncio
import base64
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch

from pe import serve
from pe.model import Instruction, PromptEmbedder, Requests
from pe.runs.batcher import Batcher, Busy
from pe.runs.extras import MissingPackage
from tests.embedders import build

pytest.importorskip("fastapi")
from fastapi.testclient import TestClient

from pe.integrations.openai_server import PATH, Limits, build_app

TEXTS = ["the river", "a longer text about bread and honey by the other bank", "moon", ""]
PROMPTS = {"query": "Find the same thing", "document": "A thing", "kind": "Find the kind"}
FORMS: list[dict[str, Any]] = [
    {"skip": "weighted", "lens_rank": 2},
    {"conditioning": "instruction_and_text"},
    {"layout": "prefix", "pooling": "mean_text"},
]


def embedder(**options: Any) -> PromptEmbedder:
    model = build("qwen3", **options)
    if model.lens is not None:
        torch.nn.init.normal_(model.lens.factors, generator=torch.Generator().manual_seed(1))
    model.instructions = dict(PROMPTS)
    return model


@pytest.fixture(scope="module")
def model() -> PromptEmbedder:
    return embedder(**FORMS[0])


@pytest.fixture
def client(model: PromptEmbedder) -> Iterator[TestClient]:
    with TestClient(build_app(model, "tiny")) as found:
        yield found


def post(client: TestClient, **body: Any) -> np.ndarray:
    answer = client.post(PATH, json=body)
    assert answer.status_code == 200, answer.text
    found = answer.json()["data"]
    assert [item["index"] for item in found] == list(range(len(found)))
    return np.array([item["embedding"] for item in found], dtype=np.float32)


def metric(client: TestClient, name: str) -> float:
    lines = client.get("/metrics").text.splitlines()
    return float(next(line.rpartition(" ")[2] for line in lines if line.startswith(f"{name} ")))


@pytest.mark.parametrize("options", FORMS, ids=["suffix", "with_text", "prefix"])
def test_each_text_under_its_own_instruction(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder(**options)
    wanted = [Instruction("find the answer"), Instruction("same topic?", "document"), Instruction("what follows?")]
    texts, index = [*TEXTS, *TEXTS[:2], TEXTS[0]], [0, 1, 2, 0, 1, 0, 2]
    expected = [
        model.encode([text], instruction=wanted[n].text, side=wanted[n].side)[0]
        for text, n in zip(texts, index, strict=True)
    ]
    read, plain = [], model.backbone.read
    monkeypatch.setattr(model.backbone, "read", lambda ids, *a, **o: read.extend(ids) or plain(ids, *a, **o))
    for batch_tokens in (10, 16_384):
        read.clear()
        got = model.encode_each(Requests(texts, wanted, index), batch_tokens)
        assert np.abs(got - expected).max() < 2e-6
        assert len(read) == (0 if model.config.layout == "prefix" else len(TEXTS))
    assert model.encode_each(Requests([], [], [])).shape == (0, model.dimensions)


def test_a_call_at_rest_walks_through_no_modules_to_set_them(monkeypatch: pytest.MonkeyPatch) -> None:
    model, requests = embedder(), Requests(TEXTS, [Instruction("any thing")], [0] * len(TEXTS))
    expected = model.encode_each(requests)
    walked: list[str] = []
    monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True: walked.append("train"))
    monkeypatch.setattr(model.backbone.model, "set_attn_implementation", walked.append)
    assert np.array_equal(model.encode_each(requests), expected)
    assert walked == []


def test_a_call_leaves_each_module_in_its_own_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    model = embedder().train()
    model.prompter.eval()
    modes, seen = [module.training for module in model.modules()], list[bool]()
    assert {*modes} == {False, True}
    plain = model.backbone.read
    monkeypatch.setattr(model.backbone, "read", lambda *a, **o: seen.append(model.training) or plain(*a, **o))
    model.encode(TEXTS, instruction="any thing")
    assert seen == [False]
    assert [module.training for module in model.modules()] == modes


def test_answers_are_those_of_encode(client: TestClient, model: PromptEmbedder) -> None:
    query, document = (model.encode(TEXTS, instruction=PROMPTS[side], side=side) for side in ("query", "document"))
    assert np.allclose(post(client, input=TEXTS, model="tiny"), query, atol=2e-6)
    assert np.allclose(post(client, input=TEXTS, prompt_name="document"), document, atol=2e-6)
    assert np.allclose(post(client, input=TEXTS, side="document"), document, atol=2e-6)
    assert np.allclose(post(client, input=TEXTS[0], prompt_name="kind")[0],
                       model.encode(TEXTS[:1], instruction=PROMPTS["kind"])[0], atol=2e-6)  # fmt: skip
    own = model.encode(TEXTS, instruction="any thing")
    assert np.allclose(post(client, input=TEXTS, instruction="any thing"), own, atol=2e-6)
    assert not np.allclose(own, query, atol=1e-3)


def test_formats_sizes_and_usage(client: TestClient, model: PromptEmbedder) -> None:
    answer = client.post(PATH, json={"input": TEXTS[:2], "encoding_format": "base64", "dimensions": 8}).json()
    rows = np.stack([np.frombuffer(base64.b64decode(item["embedding"]), "<f4") for item in answer["data"]])
    expected = model.encode(TEXTS[:2], instruction=PROMPTS["query"])[:, :8]
    assert np.allclose(rows, expected / np.linalg.norm(expected, axis=1, keepdims=True), atol=2e-6)
    tokens = sum(map(len, model.tokenize(Requests(TEXTS[:2], [Instruction("a")], [0, 0]))))
    assert answer["usage"] == {"prompt_tokens": tokens, "total_tokens": tokens}
    assert (answer["object"], answer["model"], answer["data"][0]["object"]) == ("list", "tiny", "embedding")
    assert client.get("/health").json() == {"status": "ok"}
    (known,) = client.get("/v1/models").json()["data"]
    assert (known["id"], known["prompts"], known["dimensions"]) == ("tiny", PROMPTS, model.dimensions)


def test_requests_of_several_instructions_share_a_batch(model: PromptEmbedder) -> None:
    asked = [{"instruction": "any thing"}, {"prompt_name": "kind"}, {"side": "document"}, {}]
    with TestClient(build_app(model, "tiny", Limits(window=0.3))) as client, ThreadPoolExecutor(4) as threads:
        got = list(threads.map(lambda task: post(client, input=TEXTS, **task), asked))
        assert (metric(client, "pe_batch_texts_count"), metric(client, "pe_batch_texts_sum")) == (1, 16)
    sentences = ("any thing", PROMPTS["kind"], PROMPTS["document"], PROMPTS["query"])
    for rows, sentence, task in zip(got, sentences, asked, strict=True):
        expected = model.encode(TEXTS, instruction=sentence, side=task.get("side", "query"))  # type: ignore[arg-type]
        assert np.allclose(rows, expected, atol=2e-6)


def test_nothing_is_lost_under_64_clients(client: TestClient, model: PromptEmbedder) -> None:
    sentences = ["Find the same thing", "Find the kind", "any thing"]

    def call(number: int) -> tuple[int, np.ndarray]:
        texts = [f"text {number}", TEXTS[number % 4]]
        return number, post(client, input=texts, instruction=sentences[number % 3])

    with ThreadPoolExecutor(64) as threads:
        got = dict(threads.map(call, range(128)))
    assert metric(client, "pe_texts_total") == 256
    assert metric(client, "pe_batch_texts_count") < 128
    expected = model.encode_many([f"text {n}" for n in range(128)], instructions=sentences)
    assert all(np.allclose(got[n][0], expected[n % 3, n], atol=2e-6) for n in range(128))


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (b"{", 400, "body: Invalid JSON"),
        ({}, 400, "input: Field required"),
        ({"input": []}, 400, "input: expected at least one text, got none"),
        ({"input": [1, 2]}, 400, "input: expected a text or a list of texts, got 1; token ids"),
        ({"input": "a", "user": "me"}, 400, "user: Extra inputs are not permitted"),
        ({"input": "a", "encoding_format": "int8"}, 400, "encoding_format: Input should be 'float' or 'base64'"),
        ({"input": "a", "dimensions": 33}, 400, "dimensions: expected 1 to 32, got 33"),
        ({"input": "a", "instruction": " "}, 400, "instructions: expected a sentence"),
        ({"input": "a", "instruction": "b", "prompt_name": "kind"}, 400, "prompt_name: expected none beside"),
        ({"input": "a", "prompt_name": ""}, 400, "prompt_name: expected one of 'query', 'document', 'kind', got ''"),
        ({"input": "a", "prompt_name": "sort"}, 400, "prompt_name: expected one of 'query', 'document', 'kind'"),
        ({"input": "a", "model": "other"}, 404, "model: expected 'tiny', got 'other'"),
        ({"input": ["a"] * 5}, 413, "input: expected at most 4 texts, got 5"),
        ({"input": "a" * 900}, 413, "body: expected at most 800 bytes, got more"),
        ({"input": "a", "instruction": "b" * 300}, 413, "instruction: expected at most 200 characters, got 300"),
    ],
)
def test_bad_requests_are_one_sentence(body: Any, status: int, said: str, model: PromptEmbedder) -> None:
    with TestClient(build_app(model, "tiny", Limits(texts=4, body=800, instruction=200))) as client:
        answer = client.post(PATH, content=body) if isinstance(body, bytes) else client.post(PATH, json=body)
        assert answer.status_code == status
        error = answer.json()["error"]
        assert error["message"].startswith(said)
        assert error["type"] == "invalid_request_error"
        assert metric(client, f'pe_requests_total{{status="{status}"}}') == 1


def test_unknown_paths_and_a_model_without_prompts(model: PromptEmbedder) -> None:
    plain = embedder(**FORMS[0])
    plain.instructions = {}
    with TestClient(build_app(plain, "tiny")) as client:
        assert "query texts have no default" in client.post(PATH, json={"input": "a"}).json()["error"]["message"]
        for method, path, status in (("get", PATH, 405), ("post", "/v1/chat/completions", 404)):
            answer = client.request(method, path)
            assert answer.status_code == status
            assert answer.json()["error"]["message"].endswith(f"expected POST {PATH}")


def test_a_client_that_leaves_is_no_failure(model: PromptEmbedder, caplog: pytest.LogCaptureFixture) -> None:
    app, sent = build_app(model, "tiny"), list[Any]()
    parts = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])

    async def receive() -> Any:
        return next(parts)

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": PATH, "query_string": b"", "headers": []}
    asyncio.run(app(scope, receive, send))
    assert sent[0]["status"] == 400
    assert not caplog.records


def test_full_queue_late_answers_and_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    model, held, begun = embedder(), threading.Event(), threading.Event()
    plain = model.encode_each

    def slow(requests: Requests) -> Any:
        if "fail" in requests.texts:
            raise RuntimeError("out of memory")
        begun.set()
        assert held.wait(20)
        return plain(requests)

    monkeypatch.setattr(model, "encode_each", slow)
    with TestClient(build_app(model, "tiny", Limits(waiting=1, seconds=1.0))) as client, ThreadPoolExecutor(3) as pool:
        first = pool.submit(client.post, PATH, json={"input": "a"})
        assert begun.wait(10)
        second = pool.submit(client.post, PATH, json={"input": "b"})
        while metric(client, "pe_waiting_requests") < 1:
            pass
        refused = client.post(PATH, json={"input": "c"})
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert "the server is busy: 1 calls wait already" in refused.json()["error"]["message"]
        late = [call.result() for call in (first, second)]
        assert [answer.status_code for answer in late] == [504, 504]
        assert late[0].json()["error"]["code"] == "timeout"
        assert metric(client, "pe_waiting_requests") == 0
        held.set()
        assert post(client, input="d").shape == (1, 32)
        failed = client.post(PATH, json={"input": "fail"})
        assert failed.status_code == 500
        assert failed.json()["error"]["message"] == "the server failed; its log says how"
        assert client.get("/health").status_code == 200


def test_batches_keep_their_size_and_one_failure_takes_no_other_with_it() -> None:
    batches: list[list[int]] = []

    def run(jobs: Sequence[int]) -> list[int]:
        batches.append(list(jobs))
        if 5 in jobs:
            raise ValueError("five")
        return [10 * job for job in jobs]

    async def calls() -> list[Any]:
        async with Batcher(run, lambda job: job, window=0.01, most=8, waiting=6) as batcher:
            found = [batcher.submit(job) for job in (3, 4, 20, 1, 5, 2, 7)]
            return await asyncio.gather(*found, return_exceptions=True)

    *answers, last = asyncio.run(calls())
    assert answers[:4] == [30, 40, 200, 10]
    assert str(answers[4]) == "five"
    assert answers[5] == 20
    assert isinstance(last, Busy)
    assert batches == [[3, 4], [20], [1, 5, 2], [1], [5], [2]]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--max_texts=0"], "--max_texts: expected at least 1, got 0"),
        (["--window_ms=-1"], "--window_ms: expected at least 0, got -1"),
        ([], "no saved PromptEmbedder there"),
    ],
)
def test_command_ends_with_one_message(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as stopped:
        serve.main(["./nowhere", *arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err
    monkeypatch.setattr(serve, "NEEDED", ("no_such_package",))
    with pytest.raises(MissingPackage, match=r"no_such_package is not installed: pip install 'prompt"):
        serve.serve("./nowhere")
