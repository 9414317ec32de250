"""Score an embedder on tasks of mteb, and on instructions that contradict each other: `python -m pe.evaluate MODEL`.

Scores are mteb's main score of a task, or the share of right answers (see `pe.data.instruct_score`), times 100. Nothing
is read from mteb's cache of results nor written to it. The random states of Python, NumPy and torch are the same after
scoring as before, so a training run may score on its way.
"""

from __future__ import annotations

import json
import logging
import random
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from pe.config import Dtype, nearest
from pe.data.benchmarks import instructions_of
from pe.data.instruct_score import (
    INSTRUCT,
    INSTRUCT_METRIC,
    INSTRUCT_TASKS,
    INSTRUCTIONS,
    ContradictingTasks,
    available_sets,
    read_set,
    rights,
)
from pe.data.own_tasks import is_own, own_task
from pe.data.tasks import TASKS, EvaluationError, available, offline_task
from pe.runs.cli import user_errors
from pe.runs.extras import extra
from pe.runs.files import write_text
from pe.runs.parsers import MODEL_OPTIONS, TypedParser

if TYPE_CHECKING:  # mteb takes seconds to import and is optional: what runs tasks imports it
    from mteb.abstasks.abstask import AbsTask

    from pe.integrations.mteb import TextEncoder


@dataclass(frozen=True, kw_only=True)
class TaskScore:
    """One task's result and what it was obtained with."""

    type: str
    """mteb's type of the task, such as `STS`, or `Instruct`."""
    metric: str
    """The main score of the task, such as mteb's `cosine_spearman`."""
    score: float
    """Times 100; not a number where the metric is undefined (all embeddings alike)."""
    seconds: float
    instruction: str
    document_instruction: str | None
    """None for a task without sides."""
    parts: dict[str, float] = field(default_factory=dict)
    """What a task of instructions got by side and kind of wording, such as `follows_unseen`; times 100."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """The results of one embedder; printed as a table by task type."""

    model: str
    revision: str
    tasks: dict[str, TaskScore]

    @property
    def by_task(self) -> dict[str, float]:
        """Main score of each task, times 100."""
        return {name: task.score for name, task in self.tasks.items()}

    @property
    def by_type(self) -> dict[str, float]:
        """Mean over the tasks of each type."""
        types = dict.fromkeys(task.type for task in self.tasks.values())
        return {kind: _mean([task.score for task in self.tasks.values() if task.type == kind]) for kind in types}

    @property
    def mean(self) -> float:
        """Mean over all tasks but those of instructions; over these where there are no others."""
        plain = [task.score for task in self.tasks.values() if task.type != INSTRUCT]
        return _mean(plain or list(self.by_task.values()))

    def to_dict(self) -> dict[str, Any]:
        """Plain values: the fields, and the means by type and over all tasks; None for what is not a number."""
        return _jsonable({**asdict(self), "by_type": self.by_type, "mean": self.mean})

    def write(self, path: Path) -> None:
        write_text(path, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")

    def __rich__(self) -> Table:
        return comparison({self.model: self})


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _jsonable(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _jsonable(item) for key, item in value.items()}
    return None if isinstance(value, float) and value != value else value


def comparison(columns: Mapping[str, Scores], title: str | None = None) -> Table:
    """A table of one or more results side by side, by task type; a task that one of them lacks is a dash."""
    table = Table(title=title, title_justify="left")
    table.add_column("Task")
    table.add_column("Main score")
    for name in columns:
        table.add_column(name, justify="right")

    def cells(values: Sequence[float | None]) -> list[str]:
        return ["-" if value is None else f"{value:.2f}" for value in values]

    tasks = {name: task for scores in columns.values() for name, task in scores.tasks.items()}
    for kind in dict.fromkeys(task.type for task in tasks.values()):
        means = cells([scores.by_type.get(kind) for scores in columns.values()])
        table.add_row(kind, "mean", *means, style="bold")
        for name in (name for name, task in tasks.items() if task.type == kind):
            row = cells([scores.by_task.get(name) for scores in columns.values()])
            table.add_row(f"  {name}", tasks[name].metric, *row)
            parts = [scores.tasks[name].parts if name in scores.tasks else {} for scores in columns.values()]
            for part in (part for part in tasks[name].parts if part != tasks[name].metric):
                table.add_row("", part, *cells([found.get(part) for found in parts]), style="dim")
        table.add_section()
    types = {task.type for task in tasks.values()}
    whole = f"All but {INSTRUCT}" if INSTRUCT in types and len(types) > 1 else "All tasks"
    table.add_row(whole, "mean", *cells([scores.mean for scores in columns.values()]), style="bold")
    return table


def score(
    encoder: TextEncoder,
    tasks: Sequence[str] = (),
    *,
    data: Path = Path("data"),
    benchmark: str | None = None,
    instructions: Mapping[str, str] | None = None,
    batch_tokens: int = 16_384,
    progress: bool = False,
    keep: Callable[[Scores], object] | None = None,
) -> Scores:
    """Scores of `encoder` on tasks by name: those read from `data`, or any of mteb's, read from its hub.

    Args:
        encoder: see `pe.integrations.mteb.TextEncoder`.
        tasks: names, or paths of the user's own (see `pe/data/own_tasks.py`); none: every task of `pe.data.tasks` and
            `pe.data.instruct_score` whose files are in `data`.
        data: folder of the offline tasks.
        benchmark: one of mteb's, whose tasks are scored, or those of them that `tasks` names, under the sentences of
            `pe/data/benchmarks.yaml`.
        instructions: sentences that replace a task's own: by task name for queries and for tasks without sides, by
            `NAME-document` for documents.
        batch_tokens: tokens of a batch.
        progress: show the task at work on stderr.
        keep: called with the scores so far after every task.

    Raises:
        EvaluationError: an unknown task, one whose data cannot be had, or an instruction for an unknown task.
        DataError: a task's file that is damaged.
    """
    with _untouched_random_state(), _quiet_libraries():
        found = find_tasks(tasks, data, benchmark)
        check_instructions(instructions or {}, [*found, *TASKS])
        instructions = (instructions_of(benchmark) if benchmark else {}) | dict(instructions or {})
        results: dict[str, TaskScore] = {}
        columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, disable=not progress) as bar:
            place = bar.add_task("")
            for number, (name, task) in enumerate(found.items(), start=1):
                bar.update(place, description=f"{name} ({number} of {len(found)})")
                if isinstance(task, ContradictingTasks):
                    results[name] = _run_instruct(encoder, task, batch_tokens)
                else:
                    results[name] = _run(encoder, task, instructions, batch_tokens)
                scores = Scores(model=encoder.name, revision=encoder.revision, tasks=dict(results))
                if keep is not None:
                    keep(scores)
    return scores


def _run_instruct(encoder: TextEncoder, task: ContradictingTasks, batch_tokens: int) -> TaskScore:
    start = time.perf_counter()
    parts = rights(encoder, task, batch_tokens=batch_tokens)
    return TaskScore(
        type=INSTRUCT,
        metric=INSTRUCT_METRIC,
        score=parts[INSTRUCT_METRIC],
        seconds=time.perf_counter() - start,
        instruction=f"the wordings of {' and '.join(side.name for side in task.sides)} in {INSTRUCTIONS}",
        document_instruction=task.sides[0].document,
        parts=parts,
    )


def _run(encoder: TextEncoder, task: AbsTask, instructions: Mapping[str, str] | None, batch_tokens: int) -> TaskScore:
    import mteb

    from pe.integrations.mteb import MtebEncoder

    model = MtebEncoder(encoder, instructions=instructions, batch_tokens=batch_tokens)
    metadata = task.metadata
    if metadata.name not in TASKS and not is_own(metadata.name):
        _load_from_hub(task)
    start = time.perf_counter()
    result = mteb.evaluate(model, task, cache=None, co2_tracker=False, show_progress_bar=False)
    has_sides = isinstance(metadata.prompt, dict) or metadata.simplified_task_type == "retrieval"
    return TaskScore(
        type=metadata.type,
        metric=metadata.main_score,
        score=100 * float(result.task_results[0].get_score()),
        seconds=time.perf_counter() - start,
        instruction=model.instruction(metadata, "query"),
        document_instruction=model.instruction(metadata, "document") if has_sides else None,
    )


def find_tasks(
    names: Sequence[str], data: Path, benchmark: str | None = None
) -> dict[str, AbsTask | ContradictingTasks]:
    """The tasks of these names, in order, each once; none given: every one of the benchmark or, without a benchmark,
    every offline task whose files are in `data`.

    Raises:
        EvaluationError: an unknown name, or missing files.
        MissingPackage: no mteb, where a task is one of mteb's.
        DataError: damaged files of a task of instructions.
    """
    if benchmark is not None:
        return _benchmark_tasks(benchmark, names)
    if not data.is_dir() and (not names or any(name in TASKS or name in INSTRUCT_TASKS for name in names)):
        raise EvaluationError(f"data: expected a folder of tasks, found none at {data}")
    offline = [*available(data), *available_sets(data)]
    names = list(dict.fromkeys(names)) or offline
    if not names:
        example = TASKS["PE-STSb-dev"].files[0]
        raise EvaluationError(f"{data}: expected the files of at least one task, such as {example}, found none")
    found: dict[str, AbsTask | ContradictingTasks] = {}
    for name in names:
        found[name] = read_set(name, data) if name in INSTRUCT_TASKS else _mteb_task(name, data, offline)
    return found


def _benchmark_tasks(benchmark: str, names: Sequence[str]) -> dict[str, AbsTask | ContradictingTasks]:
    """Tasks of a benchmark of mteb with its languages and splits: all, or those of these names."""
    mteb = extra("mteb", "eval")
    known = [found.name for found in mteb.get_benchmarks()]
    try:
        tasks = {task.metadata.name: task for task in mteb.get_benchmark(benchmark).tasks}
    except KeyError as error:
        hint = nearest(benchmark, known)
        raise EvaluationError(f"--benchmark: unknown {benchmark!r}{hint}\nmteb has: {'; '.join(known)}") from error
    if unknown := [name for name in names if name not in tasks]:
        hint = nearest(unknown[0], list(tasks))
        raise EvaluationError(f"{benchmark}: no task {unknown[0]!r}{hint}\nIts tasks: {', '.join(tasks)}")
    return {name: tasks[name] for name in names or tasks}


def _mteb_task(name: str, data: Path, offline: Sequence[str]) -> AbsTask:
    mteb = extra("mteb", "eval")
    if name in TASKS:
        return offline_task(name, data)
    if is_own(name):
        own: AbsTask = own_task(name)
        return own
    try:
        task: AbsTask = mteb.get_task(name)
    except KeyError as error:
        known = [*TASKS, *INSTRUCT_TASKS, *(task.metadata.name for task in mteb.get_tasks())]
        hint = f"unknown task {name!r}{nearest(name, known)}"
        listed = ", ".join(offline) or "none"
        raise EvaluationError(f"{hint}; tasks in {data}: {listed}; other names are those of mteb") from error
    return task


def check_instructions(instructions: Mapping[str, str], tasks: Sequence[str]) -> None:
    """Refuse an instruction of a task that is not among `tasks` or has its own, an empty one, or none of a user's task.

    Raises:
        EvaluationError: which, and what was expected.
    """
    for name in filter(is_own, tasks):
        if name not in instructions:
            raise EvaluationError(f"instructions: {name}: expected a sentence for the user's own task, got none")
    for key, sentence in instructions.items():
        if key.removesuffix("-document") in INSTRUCT_TASKS:
            raise EvaluationError(f"instructions: {key}: expected none, it is measured on those of {INSTRUCTIONS}")
        if key not in tasks and key.removesuffix("-document") not in tasks:
            known = ", ".join(tasks)
            raise EvaluationError(f"instructions: no task {key!r} here{nearest(key, tasks)}; tasks: {known}")
        if not sentence.strip():
            raise EvaluationError(f"instructions: {key}: expected a sentence, got {sentence!r}")


def _load_from_hub(task: AbsTask) -> None:
    """Load the data of a task, or of the tasks it is made of, before it runs: an error then is the hub's."""
    for part in getattr(task.metadata, "tasks", None) or [task]:
        try:
            part.load_data()
        except OSError as error:
            raise EvaluationError(
                f"{task.metadata.name}: its data could not be loaded from the Hugging Face hub: {error}; tasks"
                " that need no hub: see --data and pe.data.tasks"
            ) from error


@contextmanager
def _untouched_random_state() -> Iterator[None]:
    """mteb seeds every generator when it is imported and with every task."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _quiet_libraries() -> Iterator[None]:
    """No notices nor bars of mteb and of what it works with; an encoder's own warnings stay."""
    import datasets

    loggers = [logging.getLogger(name) for name in ("mteb", "datasets", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    had_bars = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module=r"(mteb|datasets|sklearn|scipy|huggingface_hub)\b")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if had_bars:
            datasets.enable_progress_bars()


def load_encoder(
    path: Path,
    *,
    backbone: str | None = None,
    prompter: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> TextEncoder:
    """A saved PromptEmbedder, on `device` or on the GPU where there is one.

    Raises:
        ValueError, OSError: no such device, or see `PromptEmbedder.from_pretrained`.
    """
    from pe.method.loading import usable_device
    from pe.model import PromptEmbedder

    place = usable_device(device)
    return PromptEmbedder.from_pretrained(path, backbone=backbone, prompter=prompter, dtype=dtype, device=place)


def _parser() -> TypedParser:
    parser = TypedParser(prog="python -m pe.evaluate", description="Score a saved PromptEmbedder.")
    parser.add_argument("model", type=Path, help="folder of a saved PromptEmbedder, or its name on the hub")
    parser.add_argument("--tasks", type=str, default="", help="names, separated by commas (default: all of --data)")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder of the offline tasks")
    parser.add_argument(
        "--benchmark", type=str, default=None, help='of mteb, such as "MTEB(eng, v2)"; --tasks: some of its tasks alone'
    )
    parser.add_argument(
        "--output", type=Path, default=None, help="JSON file for the scores, written anew after every task"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the file of --output")
    parser.add_argument(
        "--instruction",
        type=str,
        action="append",
        default=[],
        help="TASK=TEXT, or TASK-document=TEXT: a sentence in place of the task's own; may be given several times",
    )
    parser.add_model_options(*MODEL_OPTIONS)
    return parser


def _instructions(options: Sequence[str]) -> dict[str, str]:
    instructions = {}
    for option in options:
        name, equals, sentence = option.partition("=")
        if not equals:
            raise EvaluationError(f"--instruction: expected TASK=TEXT, got {option!r}")
        instructions[name.strip()] = sentence.strip()
    return instructions


def main(arguments: Sequence[str] | None = None) -> None:
    """Score as the command line says; bad input ends with one message and exit code 2."""
    options = _parser().parse_args(arguments)
    with user_errors("pe.evaluate"):
        names = [name.strip() for name in options.tasks.split(",") if name.strip()]
        instructions = _instructions(options.instruction)
        check_instructions(instructions, list(find_tasks(names, options.data, options.benchmark)))
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            if options.output.is_dir():
                raise EvaluationError(f"--output: expected a file, got the folder {options.output}")
            if options.output.exists() and not options.overwrite:
                raise EvaluationError(f"--output: {options.output} exists already; give --overwrite, or another name")
        encoder = load_encoder(options.model, **{name: getattr(options, name) for name in MODEL_OPTIONS})
        keep = None if options.output is None else lambda scores: scores.write(options.output)
        asked = {"data": options.data, "benchmark": options.benchmark, "instructions": instructions}
        scores = score(encoder, names, **asked, progress=True, keep=keep)
    Console().print(scores)
    if options.output is not None:
        print(f"Scores written to {options.output}")


if __name__ == "__main__":
    main()
