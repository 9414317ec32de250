"""Try every door to another library by the test that goes through it, and write `docs/interop.md`.

    python scripts/interop.py [--output docs/interop.md]

Ends with 1, and writes nothing, where a door is shut.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple
from xml.etree import ElementTree

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "interop.md"


class Door(NamedTuple):
    """A library as the package index calls it, what is done with it, and the tests that do it."""

    library: str
    what: str
    tests: Sequence[str]


DOORS = (
    Door("sentence-transformers", "encode queries and documents of a saved folder, instructions by name",
         ["test_sentence_transformers.py::test_a_saved_embedder_encodes_both_sides",
          "test_sentence_transformers.py::test_instructions_by_name"]),
    Door("sentence-transformers", "a process pool, an evaluator",
         ["test_sentence_transformers.py::test_other_processes_get_a_copy",
          "test_sentence_transformers.py::test_an_evaluator_of_sentence_transformers"]),
    Door("sentence-transformers", "its trainer and losses; gradients are our own pass's",
         ["test_sentence_transformers.py::test_its_trainer_trains_and_what_it_saves_loads",
          "test_sentence_transformers.py::test_the_gradients_of_its_losses_are_ours"]),
    Door("sentence-transformers", "train on what its hard-negative miner writes",
         ["test_layouts.py::test_mined_negatives_train_as_they_are"]),
    Door("sentence-transformers", "a task exported, without prompts",
         ["test_export.py::test_sentence_transformers_takes_the_one_prompt"]),
    Door("mteb", "the tasks of its mock run", ["test_evaluate.py::test_mock_tasks_of_mteb"]),
    Door("mteb", "a model of sentence-transformers in it",
         ["test_sentence_transformers.py::test_mteb_over_sentence_transformers"]),
    Door("huggingface-hub", "push to a hub, load by name in both libraries, from a server on this machine",
         ["test_hub.py::test_an_embedder_goes_to_the_hub_and_back"]),
    Door("peft", "an adapter's folder as backbone, merged; beside PEFT's own pass",
         ["test_loading.py::test_an_adapter_is_merged_into_its_base"]),
    Door("peft", "a task exported as prompt tuning", ["test_export.py::test_peft_adapter_in_stock_peft"]),
    Door("transformers", "a task exported for vLLM, in one pass of a stock model (not in vLLM)",
         ["test_export.py::test_vllm_rows_in_one_pass_of_transformers",
          "test_export.py::test_the_check_of_vllm_sees_another_pooling"]),
    Door("fastapi", "`pe.serve` in OpenAI's protocol: all formats, 64 clients at once",
         ["test_serve.py::test_formats_sizes_and_usage", "test_serve.py::test_nothing_is_lost_under_64_clients"]),
    Door("gguf", "a GGUF file as backbone and as prompting LLM",
         ["test_gguf.py::test_an_embedder_is_made_of_gguf_files_saved_and_moved"]),
    Door("datasets", "training data in eleven layouts, from every kind of file and a saved data set",
         ["test_layouts.py::test_a_layout_of_the_page_gives_the_examples_of_our_own",
          "test_layouts.py::test_every_door_gives_the_same_rows_and_refuses_the_same_column"]),
    Door("fsspec", "files at an address, embedded into shards at another",
         ["test_encode_bulk.py::test_texts_and_an_address_of_fsspec"]),
    Door("ray", "bulk encoding, killed and gone on with, beside one process",
         ["test_encode_ray.py::test_killed_it_goes_on_and_equals_one_process"]),
    Door("accelerate", "two processes have the gradients of one with both batches, even and uneven",
         ["test_several.py::test_two_processes_have_the_gradients_of_one"]),
    Door("mlflow-skinny", "losses of a run, beside TensorBoard's; wandb offline",
         ["test_train.py::test_a_run_is_logged_where_it_is_asked"]),
)  # fmt: skip
HEAD = """# Other libraries

Back to the [README](../README.md). Each row is a door to another library and what went through it when
`python scripts/interop.py` wrote this page: the tests named there, on small models, on a CPU. Python {python},
torch {torch}.

| library | what was run | result |
| --- | --- | --- |
"""


def outcomes(report: Path) -> Mapping[str, str]:
    """Passed, failed or skipped, by test: the file's and function's name; the worst of a test's cases."""
    worst: dict[str, str] = {}
    rank = ("passed", "skipped", "failed")
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.attrib['classname'].rpartition('.')[2]}.py::{case.attrib['name'].partition('[')[0]}"
        tags = {child.tag for child in case}
        found = "failed" if tags & {"failure", "error"} else "skipped" if "skipped" in tags else "passed"
        worst[name] = max(worst.get(name, "passed"), found, key=rank.index)
    return worst


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tests and write the page; 1 where not every door is open."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=TARGET)
    given = parser.parse_args(argv)
    wanted = [f"tests/{test}" for door in DOORS for test in door.tests]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junit-xml={report}", *wanted], cwd=ROOT, check=False)
        found = outcomes(report)
    shut = {test: found.get(test, "not run") for door in DOORS for test in door.tests if found.get(test) != "passed"}
    for test, outcome in shut.items():
        print(f"{test}: {outcome}", file=sys.stderr)
    if shut:
        return 1
    rows = [f"| {door.library} {version(door.library)} | {door.what} | works |" for door in DOORS]
    python = ".".join(map(str, sys.version_info[:3]))
    given.output.write_text(
        HEAD.format(python=python, torch=version("torch")) + "\n".join(rows) + "\n", encoding="utf-8"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
