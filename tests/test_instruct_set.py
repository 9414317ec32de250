"""A training set of contradicting instructions: what a batch holds, and what the loss sees of it."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from accelerate import Accelerator

from pe.config import DatasetConfig, LossConfig, RecipeError
from pe.data.batches import Batch, BatchPlan
from pe.data.instruct_set import InstructSet, first_wordings, load_instruct_set
from pe.data.records import DataError
from pe.losses import backward, batch_requests, contrastive_loss, counterpart_loss

DOCUMENT = "Represent it"


def task(name: str, other: str) -> dict[str, Any]:
    train, unseen = [f"{name} this.", f"Now {name}!"], [f"Please {name}."]
    return {"contradicts": other, "dataset": "x", "document": DOCUMENT, "train": train, "unseen": unseen}


def row(number: int, query: str | None = None) -> dict[str, Any]:
    yes, no = f"yes {number}", f"no {number}"
    sides = {"yea": {"positive": yes, "negatives": [no]}, "nay": {"positive": no, "negatives": [yes]}}
    return {"query": query or f"query {number}", "sides": sides}


def written(folder: Path, rows: list[dict[str, Any]], **changed: Any) -> DatasetConfig:
    (folder / "tasks.yaml").write_text(yaml.safe_dump({"yea": task("yea", "nay"), "nay": task("nay", "yea")} | changed))
    (folder / "x.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return DatasetConfig(path=str(folder / "x.jsonl"), instruct=str(folder / "tasks.yaml"))


@pytest.fixture
def dataset(tmp_path: Path) -> InstructSet:
    return load_instruct_set(written(tmp_path, [row(number) for number in range(6)]))


def sides(batch: Batch) -> list[int]:
    """0 for each query that asks for *yea*, 1 for *nay*: their wordings hold those words."""
    return [int("nay" in batch.instructions[asked]) for asked in batch.asked]


def test_a_batch_holds_both_sides_of_every_row(dataset: InstructSet) -> None:
    batch = BatchPlan([dataset], [1.0], 3, 8, 0).batch(1)

    assert len(batch.queries) == 8
    assert len(batch.documents) == 8  # the other side's positive is this side's negative, and stands once
    for b in range(8):
        number, wanted = batch.queries[b].split()[1], ("yes", "no")[sides(batch)[b]]
        assert batch.documents[b] == f"{wanted} {number}"
        counterpart = batch.documents[batch.counterparts[b]]
        assert counterpart == f"{'no' if wanted == 'yes' else 'yes'} {number}"
    requests = batch_requests(batch)
    assert [requests.instruction(place).side for place in (0, 7, 8, 15)] == ["query", "query", "document", "document"]
    assert requests.instruction(8).text == DOCUMENT
    assert requests.instruction(0).text in dataset.tasks[sides(batch)[0]].train


def test_every_query_has_a_wording_of_its_own_and_the_seed_repeats_them(dataset: InstructSet) -> None:
    plan = BatchPlan([dataset], [1.0], 30, 8, 0)
    assert any(len(plan.batch(step).instructions) == 4 for step in range(30))
    first = plan.batch(0)
    assert len({(first.queries[b], first.instructions[first.asked[b]]) for b in range(8)}) == 8
    used = {text for step in range(30) for text in plan.batch(step).instructions}
    assert used == {*dataset.tasks[0].train, *dataset.tasks[1].train}
    again = BatchPlan([dataset], [1.0], 30, 8, 0)
    assert [plan.batch(s).instructions for s in range(30)] == [again.batch(s).instructions for s in range(30)]


def test_processes_share_one_batch(dataset: InstructSet) -> None:
    plan = BatchPlan([dataset], [1.0], 4, 8, 0)
    for step in range(4):
        batch, parts = plan.batch(step), [plan.batch(step, index, 3) for index in range(3)]
        assert [len(part.queries) for part in parts] == [2, 2, 4], "no row is parted"
        assert [query for part in parts for query in part.queries] == batch.queries
        asked = [part.instructions[place] for part in parts for place in part.asked]
        assert asked == [batch.instructions[place] for place in batch.asked]


def vectors(batch: Any, answers: dict[str, torch.Tensor]) -> torch.Tensor:
    texts = [f"{'yea' if a == 0 else 'nay'} {q}" for a, q in zip(sides(batch), batch.queries, strict=True)]
    return torch.stack([answers[text] for text in [*texts, *batch.documents]])


def test_the_loss_sees_the_contradiction_but_no_other_positive(tmp_path: Path) -> None:
    """Query 0 stands in two rows: the second row's answers are no negatives of the first's, its counterpart is one."""
    dataset = load_instruct_set(written(tmp_path, [row(0), row(1, "query 0"), row(2), row(3)]))
    batch = BatchPlan([dataset], [1.0], 1, 8, 0).batch(0)
    torch.manual_seed(0)
    names = {f"{side} query {n}" for side in ("yea", "nay") for n in range(4)}
    answers = {name: F.normalize(torch.randn(6), dim=0) for name in sorted({*names, *batch.documents})}
    embeddings = vectors(batch, answers)
    got = contrastive_loss(embeddings, batch, LossConfig(temperature=0.1), Accelerator(cpu=True))
    q, d = embeddings[:8], embeddings[8:]
    losses, side = [], sides(batch)
    for b in range(8):
        same = [c for c in range(8) if c != b and side[c] == side[b] and batch.queries[c] == batch.queries[b]]
        logits = (q[b] @ d.T / 0.1).index_fill(0, torch.tensor(same, dtype=torch.long), -torch.inf)
        losses.append(F.cross_entropy(logits, torch.tensor(b)))
    torch.testing.assert_close(got, torch.stack(losses).mean())


def test_what_another_row_shows_to_be_right_too_is_no_negative(tmp_path: Path) -> None:
    """Labels of one side mask on that side alone: rows 0 and 1 share a *yea*, and row 2 differs from 0 by a *nay*."""
    yea, nay = ["A", "A", "B", "C"], ["x", "y", "x", "z"]
    rows = [row(number) for number in range(4)]
    for number, made in enumerate(rows):
        made["sides"]["yea"] |= {"shared_label": yea[number], "other_label": "y" if number == 3 else "q"}
        made["sides"]["nay"] |= {"shared_label": nay[number], "other_label": "B" if number == 0 else "Q"}
    batch = BatchPlan([load_instruct_set(written(tmp_path, rows))], [1.0], 1, 8, 0).batch(0)
    side = sides(batch)
    assert side == batch.sides.tolist()
    number = [int(query.split()[1]) for query in batch.queries]
    right = {  # of each side and document, its label there
        0: {f"yes {n}": yea[n] for n in range(4)} | {"no 0": "B"},
        1: {f"no {n}": nay[n] for n in range(4)} | {"yes 3": "y"},
    }
    torch.manual_seed(0)
    embeddings = F.normalize(torch.randn(16, 6), dim=-1)
    got = contrastive_loss(embeddings, batch, LossConfig(temperature=0.1), Accelerator(cpu=True))
    q, d, losses, masked = embeddings[:8], embeddings[8:], [], 0
    for b in range(8):
        own = (yea, nay)[side[b]][number[b]]
        same = [c for c in range(8) if c != b and right[side[b]].get(batch.documents[c]) == own]
        masked += len(same)
        logits = (q[b] @ d.T / 0.1).index_fill(0, torch.tensor(same, dtype=torch.long), -torch.inf)
        losses.append(F.cross_entropy(logits, torch.tensor(b)))
    assert masked == 6
    torch.testing.assert_close(got, torch.stack(losses).mean())


def test_counterpart_loss_is_a_choice_between_two(dataset: InstructSet) -> None:
    batch = BatchPlan([dataset], [1.0], 1, 4, 0).batch(0)
    torch.manual_seed(1)
    embeddings = F.normalize(torch.randn(8, 5), dim=-1).requires_grad_()
    q, d = embeddings[:4], embeddings[4:]
    pairs = torch.stack([torch.stack([q[b] @ d[b], q[b] @ d[batch.counterparts[b]]]) for b in range(4)])
    expected = F.cross_entropy(pairs / 0.2, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(counterpart_loss(embeddings, batch, 0.2), expected)


def test_the_weight_of_the_counterparts_reaches_the_gradient(dataset: InstructSet) -> None:
    batch = BatchPlan([dataset], [1.0], 1, 4, 0).batch(0)
    torch.manual_seed(1)
    losses = {}
    for weight in (0.0, 4.0):
        rows = torch.nn.Parameter(F.normalize(torch.randn(8, 5), dim=-1))
        config = LossConfig(counterpart=weight)
        losses[weight] = backward(lambda _: F.normalize(rows, dim=-1), batch, config, Accelerator(cpu=True))  # noqa: B023
        assert rows.grad is not None
        torch.manual_seed(1)
    assert losses[4.0] > losses[0.0]


def test_without_contradictions_there_is_none(dataset: InstructSet) -> None:
    batch = BatchPlan([dataset], [1.0], 1, 4, 0).batch(0)
    plain = type(batch)(**{**vars(batch), "counterparts": np.full(4, -1)})
    assert counterpart_loss(torch.randn(8, 5), plain, 0.1) == 0


def test_names_of_what_was_trained(dataset: InstructSet) -> None:
    assert first_wordings([dataset]) == {"yea": "yea this.", "nay": "nay this."}


def test_an_odd_batch_is_refused(dataset: InstructSet) -> None:
    with pytest.raises(DataError, match=r"x\.jsonl: expected a batch_size that 2 divides, .* got 5"):
        BatchPlan([dataset], [1.0], 1, 5, 0)


def test_tasks_without_training_wordings_are_refused(tmp_path: Path) -> None:
    unseen = {name: task(name, other) | {"train": []} for name, other in (("yea", "nay"), ("nay", "yea"))}
    with pytest.raises(DataError, match="yea: expected wordings to train on, got none"):
        load_instruct_set(written(tmp_path, [row(0)], **unseen))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"instruction": "Find it"}, "instruction: expected none beside `instruct`"),
        ({"document_instruction": "Be found"}, "document_instruction: expected none beside `instruct`"),
        ({"positive_from": 4.0}, "positive_from: expected none beside `instruct`"),
        ({"on_bad_record": "skip"}, "on_bad_record: expected 'error' beside `instruct`"),
    ],
)
def test_options_that_would_not_be_used_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        DatasetConfig(path="x.jsonl", instruct="tasks.yaml", **values)


def test_a_limit_is_kept_and_told(tmp_path: Path) -> None:
    config = written(tmp_path, [row(number) for number in range(6)])
    limited = load_instruct_set(dataclasses.replace(config, max_rows=4))
    assert len(limited) == 4
    assert "stopped at max_rows = 4" in str(limited.report)
    assert load_instruct_set(config).report.max_rows is None
    with pytest.raises(DataError, match=r"x\.jsonl: max_rows: expected at least 1, or null, got 0"):
        load_instruct_set(dataclasses.replace(config, max_rows=0))
