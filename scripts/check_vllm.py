"""Compare what vLLM gives under an exported prompt with one pass of stock transformers over the same rows.

    python scripts/check_vllm.py TASK [TEXT ...] [--dtype float32]

TASK is a folder of `pe.export --to vllm`. It needs what its `client.py` needs, vLLM, transformers and safetensors, and
nothing of this repository, so this file may be copied to where vLLM runs. It prints each text's cosine and ends with 1
where one is too low.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

TEXTS = ("a", "The river rose over the bank.", "Bread and honey. " * 40, "naïve 東京 🙂", "")
LEAST_COSINE = {"float32": 0.9999, "bfloat16": 0.99, "float16": 0.999}


@torch.no_grad()
def one_pass(model: Any, rows: Sequence[Tensor]) -> Tensor:
    """The last state `[N, D]` of each text's rows `[L + R, D]`, of length one."""
    states = [model(inputs_embeds=item[None]).last_hidden_state[0, -1] for item in rows]
    return torch.nn.functional.normalize(torch.stack(states).float(), dim=-1)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", type=Path)
    parser.add_argument("texts", nargs="*", default=TEXTS)
    parser.add_argument("--dtype", choices=LEAST_COSINE, default="float32", help="of the weights, on both sides")
    given = parser.parse_args(argv)
    client = runpy.run_path(str(given.task / "client.py"))
    prompt = client["load_prompt"](given.task / "prompt.safetensors")
    tokenizer, model = client["stock"](prompt.about, given.dtype)
    rows = client["prompt_embeds"](given.texts, prompt, tokenizer, model.get_input_embeddings())
    expected = one_pass(model.eval(), rows)
    got = torch.tensor(client["embed"](rows, prompt.about, dtype=given.dtype))
    cosines = torch.nn.functional.cosine_similarity(got.float(), expected, dim=-1).tolist()
    for text, cosine in zip(given.texts, cosines, strict=True):
        print(f"{cosine:.6f} {text[:60]!r}")
    least = LEAST_COSINE[given.dtype]
    if is_far := min(cosines) < least:
        print(f"expected cosines of at least {least}, got {min(cosines):.6f}", file=sys.stderr)
    return int(is_far)


if __name__ == "__main__":
    sys.exit(main())
