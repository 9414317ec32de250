"""`python -m pe.export MODEL OUTPUT --to safetensors | peft | vllm | sentence-transformers [--instruction TEXT]`

Writes the finished prompt of one instruction for other libraries. OUTPUT is a new `.safetensors` file, or a new folder:

- `safetensors`: the prompt's rows, of any embedder; what else its embeddings need stands in the metadata.
- `peft`: a prompt-tuning adapter of the backbone (prefix layout).
- `vllm`: the rows, and a client that gives them to vLLM behind each text (last-token pooling, nothing around it).
- `sentence-transformers`: the embedder itself, with this instruction as its default prompt.

What a target would compute otherwise than the embedder is refused.

Legend: H tokens of an instruction before the prompt (prefix layout, else 0), K soft tokens, R = H + K, D the backbone's
width.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from jsonargparse import Namespace
from peft import PromptTuningConfig, TaskType
from safetensors.torch import save
from torch import Tensor

from pe.integrations import vllm_client
from pe.method.gguf import is_gguf
from pe.method.loading import Filled, commit_of, quiet
from pe.method.requests import check_instructions
from pe.model import Instruction, PromptEmbedder, Requests, Side
from pe.runs.cli import user_errors
from pe.runs.parsers import TypedParser

Target = Literal["safetensors", "peft", "vllm", "sentence-transformers"]
SERVED: dict[Target, dict[str, tuple[object, ...]]] = {
    "safetensors": {"conditioning": ("instruction",)},
    "peft": {"conditioning": ("instruction",), "layout": ("prefix",), "layers": (None,)},
    "vllm": {
        "conditioning": ("instruction",),
        "pooling": ("last",),
        "reader": ("none",),
        "skip": ("none",),
        "lens_rank": (0,),
        "quantize": ("none",),
        "layers": (None,),
        "entry_layer": (0,),
    },
    "sentence-transformers": {},
}
"""Options of an embedder that a target can serve only with some values."""
WHY = {
    "conditioning": "each text has a prompt of its own",
    "layout": "an adapter's rows stand before the text",
    "pooling": "it pools the last token, or every token of text and prompt",
    "reader": "its adapters would act on the text, too: two passes, not one",
    "skip": "it is added behind the last pass, from states in the middle of the model",
    "lens_rank": "it scales the embedding behind the last pass",
    "quantize": "the text was read in 8 bits, the prompt was not",
    "layers": "it runs all layers of the backbone",
    "entry_layer": "it runs all layers on the prompt",
}
RECIPE = {"peft": "recipes/tiny-paper.yaml", "vllm": "recipes/servable.yaml"}
"""A recipe of what a target serves."""
PROBES = ("a", " Two words.\n", "naïve 東京 🙂", "")


@dataclass(frozen=True)
class Entry:
    """What stands beside a text under one instruction.

    Attributes:
        rows: `[R, D]` in the space of the backbone's `inputs_embeds`; the last K are the soft tokens.
        gates: `[D]` what a lens makes of the instruction; None without one.
        about: instruction, backbone and how the rows are used, as JSON has it.
    """

    rows: Tensor
    gates: Tensor | None
    about: dict[str, Any]

    def tensors(self) -> dict[str, Tensor]:
        """By the names that they have in a file."""
        return {"prompt": self.rows} | ({} if self.gates is None else {"gates": self.gates})


@torch.no_grad()
def entry_of(model: PromptEmbedder, instruction: Instruction) -> Entry:
    """The prompt of an instruction, finished.

    Raises:
        ValueError: prompts depend on the text, too.
    """
    backbone, config = model.backbone, model.config
    rows = model.prompt_bank([instruction])[0]
    head: list[int] = []
    if config.layout == "prefix":
        (head,) = backbone.text_tokenizer([model.prefix_text(instruction)])
        rows = torch.cat([backbone.token_rows(torch.tensor(head, device=rows.device)), rows])
    about = {
        "instruction": instruction.text,
        "side": instruction.side,
        "embedder": model.revision,
        "backbone": backbone.name,
        "backbone_content": backbone.revision,
        "revision": None if Path(backbone.name).exists() else commit_of(backbone.model),
        "soft_tokens": config.prompter.soft_tokens,
        "head_tokens": len(head),
        "width": backbone.hidden_size,
        "layout": config.layout,
        "pooling": config.pooling,
        "normalisation": "l2",
        "reader": config.reader,
        "skip": config.skip,
        "lens_rank": config.lens_rank,
        "quantize": config.backbone.quantize,
        "layers": config.backbone.layers,
        "entry_layer": config.backbone.entry_layer,
        **reading_of(model, instruction.side),
    }
    gates = model.write_prompts(Requests([""], [instruction], [0]))[0].gates if model.lens is not None else None
    return Entry(rows.contiguous().cpu(), None if gates is None else gates[0].contiguous().cpu(), about)


def reading_of(model: PromptEmbedder, side: Side) -> dict[str, Any]:
    """How a side's texts become token ids, as `vllm_client.text_ids` takes it."""
    config, tokenizer = model.config, model.backbone.text_tokenizer
    return {
        "template": getattr(config.templates, side).text,
        "lead": tokenizer.lead if config.layout == "suffix" else [],
        "filler": tokenizer.filler,
        "max_length": config.max_length,
    }


def check_served(model: PromptEmbedder, side: Side, target: Target) -> None:
    """Refuse what a target would compute otherwise.

    Raises:
        ValueError: options that it cannot serve, all by name; a template or a backbone that stock libraries would read
            otherwise.
    """
    config = model.config
    found = vars(config) | vars(config.backbone)
    wrong = [
        f"{name}: expected {' or '.join(map(repr, allowed))}, got {found[name]!r} ({WHY[name]})"
        for name, allowed in SERVED[target].items()
        if found[name] not in allowed
    ]
    if wrong:
        cure = f", as {RECIPE[target]} does" if target in RECIPE else ""
        raise ValueError(f"--to {target}: {'; '.join(wrong)}; train the embedder with what is expected{cure}")
    if target not in ("peft", "vllm"):
        return
    name, tokenizer, reading = model.backbone.name, model.backbone.text_tokenizer, reading_of(model, side)
    if is_gguf(name):
        raise ValueError(f"--to {target}: expected a backbone in a folder or on the hub, got the GGUF file {name}")
    template = reading["template"]
    read = tokenizer([Filled(template, text=text) for text in PROBES], lead=config.layout == "suffix")
    ours = [ids[: config.max_length] for ids in read]
    if vllm_client.text_ids(tokenizer.tokenizer, PROBES, reading) != ours:
        raise ValueError(
            f"--to {target}: templates.{side}.text: expected one without special tokens, got {template!r}, which stock"
            " tokenizers read otherwise; train without them"
        )


def save_rows(entry: Entry, file: Path) -> None:
    """The tensors of an entry, with all that is known of them as metadata; `about` has it as JSON."""
    shown = {name: value if isinstance(value, str) else json.dumps(value) for name, value in entry.about.items()}
    file.write_bytes(save(entry.tensors(), {"format": "pt", **shown, "about": json.dumps(entry.about)}))


def save_peft(entry: Entry, folder: Path) -> None:
    """A prompt-tuning adapter whose virtual tokens are the rows."""
    folder.mkdir()
    PromptTuningConfig(
        task_type=TaskType.FEATURE_EXTRACTION,
        num_virtual_tokens=len(entry.rows),
        base_model_name_or_path=entry.about["backbone"],
        revision=entry.about["revision"],
        inference_mode=True,
    ).save_pretrained(str(folder))
    about = {"format": "pt", "about": json.dumps(entry.about)}
    (folder / "adapter_model.safetensors").write_bytes(save({"prompt_embeddings": entry.rows}, about))


def save_vllm(entry: Entry, folder: Path) -> None:
    """The rows, and a client beside them that needs nothing of this library."""
    folder.mkdir()
    save_rows(entry, folder / "prompt.safetensors")
    shutil.copyfile(vllm_client.__file__, folder / "client.py")


SAVED: dict[Target, Callable[[Entry, Path], None]] = {"safetensors": save_rows, "peft": save_peft, "vllm": save_vllm}


def export(
    model: str,
    output: str,
    *,
    to: Target,
    instruction: str | None = None,
    side: Side = "query",
    backbone: str | None = None,
    prompter: str | None = None,
) -> None:
    """Write the finished prompt of one instruction for another library.

    Args:
        model: folder of a saved PromptEmbedder, or its name on the hub.
        output: what is written: a `.safetensors` file, or a folder; there must be none yet.
        to: who will use it.
        instruction: a sentence; where none is given, the side's default, the one that training weighted most.
        side: whose templates are used.
        backbone: where the backbone is now, if not where it was.
        prompter: where the base of a prompting LLM with adapters is now, if not where it was.

    Raises:
        FileExistsError: there is something at `output` already.
        ValueError: a name that does not fit, no instruction and no default, or what the target cannot serve.
    """
    path = Path(output)
    if os.path.lexists(path):
        raise FileExistsError(f"{output}: exists already; give another name")
    if (to == "safetensors") != (path.suffix == ".safetensors"):
        expected = "a name ending in .safetensors" if to == "safetensors" else "the name of a folder"
        raise ValueError(f"output: --to {to}: expected {expected}, got {output}")
    embedder = PromptEmbedder.from_pretrained(model, backbone=backbone, prompter=prompter)
    if instruction is None:
        instruction = embedder.default_instruction(side)
        print(f"no --instruction, so the prompt is that of {side} texts: {instruction!r}", file=sys.stderr)
    (wanted,) = check_instructions([Instruction(instruction, side)])
    check_served(embedder, side, to)
    path.parent.mkdir(parents=True, exist_ok=True)
    if to == "sentence-transformers":
        embedder.instructions = {side: instruction}
        embedder.save_pretrained(path)
        print(f"{output}: the embedder, with {instruction!r} as the default prompt of {side} texts", file=sys.stderr)
        return
    entry = entry_of(embedder, wanted)
    with tempfile.TemporaryDirectory(prefix=f"{path.name}.", dir=path.parent) as folder:
        SAVED[to](entry, Path(folder) / path.name)
        (Path(folder) / path.name).rename(path)
    print(f"{output}: {list(entry.rows.shape)} {entry.rows.dtype} for {entry.about['backbone']}", file=sys.stderr)


def parse(argv: Sequence[str] | None) -> Namespace:
    """The arguments of `export`; strings are as they are typed."""
    parser = TypedParser(prog="python -m pe.export", description="Write one instruction's prompt for a library.")
    typed: set[str | int] = {"to", "instruction", "backbone", "prompter"}
    parser.add_function_arguments(export, as_positional=True, skip=typed)
    parser.add_argument("--to", type=Target, required=True, help=f"who will use it: {', '.join(get_args(Target))}")
    parser.add_typed("instruction", str, "a sentence (default: that of training)")
    parser.add_model_options("backbone", "prompter")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Export as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments = parse(argv)
    with user_errors("pe.export"):
        export(**vars(arguments))


if __name__ == "__main__":
    main()
