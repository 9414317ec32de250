"""An embedder goes to a model hub and comes back by its name, in both libraries."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import ModelCard

from pe.model import PromptEmbedder
from tests.hub_server import hub

CODE = """
import sys
from importlib.util import find_spec
import numpy as np
from pe.model import PromptEmbedder

texts, made, found = ["the river", "a loaf of bread"], sys.argv[1], sys.argv[2]
address = PromptEmbedder.from_pretrained(made).push_to_hub("user/name", private=True, commit_message="First")
assert address.startswith(sys.argv[3] + "/user/name/commit/"), address
embeddings = {"ours": PromptEmbedder.from_pretrained("user/name").encode(texts)}
if len(sys.argv) > 4:
    from sentence_transformers import SentenceTransformer

    embeddings["theirs"] = SentenceTransformer("user/name", trust_remote_code=True, device="cpu").encode(texts)
np.savez(found, **embeddings)
"""


def test_an_embedder_goes_to_the_hub_and_back(checkpoint: Path, tmp_path: Path) -> None:
    """The models it was made of are in folders that others do not have, so the backbone goes along."""
    libraries = ["sentence-transformers"] if find_spec("sentence_transformers") else []
    with hub() as (address, files):
        environment = os.environ | {
            "HF_ENDPOINT": address,
            "HF_HOME": str(tmp_path / "home"),
            "HF_TOKEN": "hf_of_nobody",
            "HF_HUB_OFFLINE": "0",
            "NO_PROXY": "127.0.0.1",
        }
        arguments = [str(checkpoint), str(tmp_path / "found.npz"), address, *libraries]
        subprocess.run([sys.executable, "-c", CODE, *arguments], env=environment, check=True)
    sent = files["user/name"]
    card = sent["README.md"].decode()
    assert sent["recipe.yaml"] == (checkpoint / "recipe.yaml").read_bytes()
    assert ModelCard(card).data.to_dict() == ModelCard.load(checkpoint / "README.md").data.to_dict()
    assert 'PromptEmbedder.from_pretrained("user/name")' in card
    assert 'SentenceTransformer("user/name", trust' in card
    assert str(checkpoint.parents[2]) not in card
    expected = PromptEmbedder.from_pretrained(checkpoint).encode(["the river", "a loaf of bread"])
    found = np.load(tmp_path / "found.npz")
    assert len(found) == 1 + len(libraries)
    for name in found:
        assert np.allclose(found[name], expected, atol=1e-6), name


def test_a_card_stays_with_its_weights(checkpoint: Path, tmp_path: Path) -> None:
    model = PromptEmbedder.from_pretrained(checkpoint)
    for folder in (tmp_path / "one", tmp_path / "two"):
        model.save_pretrained(folder)
        for file in ("README.md", "recipe.yaml"):
            assert (folder / file).read_bytes() == (checkpoint / file).read_bytes()
        model = PromptEmbedder.from_pretrained(folder)
    with torch.no_grad():
        model.alignment.weight[0, 0] += 1  # type: ignore[operator, union-attr]
    model.save_pretrained(tmp_path / "changed")
    card = ModelCard.load(tmp_path / "changed" / "README.md")
    assert card.text.strip() == "A PromptEmbedder."
    assert card.data.library_name == "promptembedder"
    assert not (tmp_path / "changed" / "recipe.yaml").exists()
