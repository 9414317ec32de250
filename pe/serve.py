"""`python -m pe.serve MODEL [--host 127.0.0.1] [--port 8000]`

Serves OpenAI's `/v1/embeddings` (see `docs/serving.md`), and `/v1/models`, `/health`, `/metrics`. It knows no keys:
whoever reaches the port may use it, and by default only this machine does.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jsonargparse import Namespace

from pe.config import Dtype
from pe.method.loading import quiet, usable_device
from pe.model import PromptEmbedder
from pe.runs.cli import user_errors
from pe.runs.extras import extra
from pe.runs.parsers import MODEL_OPTIONS, TypedParser

NEEDED = ("fastapi", "uvicorn", "prometheus_client")
LAST_PORT = 65535
LOOPBACK = ("127.0.0.1", "::1", "localhost")


def check_limits(**given: float) -> None:
    """Raise ValueError for a limit that would let no request through."""
    for name, value in given.items():
        least = 0 if name == "window_ms" else 1
        if value < least:
            raise ValueError(f"--{name}: expected at least {least}, got {value:g}")
    if given.get("port", 0) > LAST_PORT:
        raise ValueError(f"--port: expected 1 to {LAST_PORT}, got {given['port']}")


def serve(
    model: str,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    name: str | None = None,
    window_ms: float = 5.0,
    batch_texts: int = 256,
    max_texts: int = 2048,
    max_body_kib: int = 2048,
    max_waiting: int = 256,
    timeout: float = 60.0,
    backbone: str | None = None,
    prompter: str | None = None,
    dtype: Dtype | None = None,
    device: str | None = None,
) -> None:
    """Serve an embedder until the process is told to end.

    Args:
        model: folder of a saved PromptEmbedder, or its name on the hub.
        host: address that is listened on; any but a loopback one lets other machines in.
        port: port that is listened on.
        name: what clients call the model; as MODEL is typed where it is not given.
        window_ms: milliseconds that a first request waits for others to share its batch.
        batch_texts: texts of a batch; a larger request runs alone.
        max_texts: texts of a request; one with more gets 413.
        max_body_kib: size of a request in KiB; a larger one gets 413.
        max_waiting: requests that may wait for a batch; one more gets 503.
        timeout: seconds after which a request gets 504.
        backbone: where the backbone is now, if not where it was.
        prompter: where the base of a prompting LLM with adapters is now, if not where it was.
        dtype: type of the backbone's weights; as in training where it is not given.
        device: cpu, cuda, cuda:1; a GPU where there is one.
    """
    for package in NEEDED:
        extra(package, "serve")
    check_limits(
        port=port,
        window_ms=window_ms,
        batch_texts=batch_texts,
        max_texts=max_texts,
        max_body_kib=max_body_kib,
        max_waiting=max_waiting,
        timeout=timeout,
    )
    import uvicorn

    from pe.integrations.openai_server import Limits, build_app

    place = usable_device(device)
    embedder = PromptEmbedder.from_pretrained(model, backbone=backbone, prompter=prompter, dtype=dtype, device=place)
    limits = Limits(
        window=window_ms / 1000,
        batch_texts=batch_texts,
        texts=max_texts,
        body=max_body_kib << 10,
        waiting=max_waiting,
        seconds=timeout,
    )
    if host not in LOOPBACK:
        print(f"pe.serve: {host} lets other machines in, and the server asks for no key", file=sys.stderr)
    uvicorn.run(build_app(embedder, name or model, limits), host=host, port=port)


def parse(argv: Sequence[str] | None) -> Namespace:
    """The arguments of `serve`; strings are as they are typed."""
    parser = TypedParser(prog="python -m pe.serve", description="Serve OpenAI's /v1/embeddings.")
    parser.add_function_arguments(serve, as_positional=True, skip={"name", *MODEL_OPTIONS})
    parser.add_typed("name", str, "what clients call the model (default: MODEL)")
    parser.add_model_options(*MODEL_OPTIONS)
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Serve as the command line says; bad input ends with one message and exit code 2."""
    quiet()
    arguments = parse(argv)
    with user_errors("pe.serve"):
        serve(**vars(arguments))


if __name__ == "__main__":
    main()
