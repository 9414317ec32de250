"""Make the compact data set of `data/` from the folder of the whole sets.

    python scripts/make_data.py SOURCE data/

SOURCE holds `manifest.json`, a list of `{"file", "rows", "sha256", "ship", ...}`, and the files it names. Every file is
checked against its SHA-256 sum and must be marked as one that may ship. Rows are copied byte for byte; a capped set
keeps rows spread evenly over the file. The same source and xz library give the same bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
from pathlib import Path

LIMIT_BYTES = 6_000_000
CAPS: dict[str, int | None] = {  # source file: rows kept, None for all
    "train/nli.jsonl.xz": None,
    "train/medquad.jsonl.xz": 5_000,
    "train/headline.jsonl.xz": 5_000,
    "train/banking77.jsonl.xz": None,
    "train/clinc150.jsonl.xz": None,
    "train/stsb.jsonl": None,
    "eval/stsb_dev.jsonl": None,
    "eval/stsb_test.jsonl": None,
    "eval/banking77_test.jsonl": None,
    "eval/clinc150_test.jsonl": None,
    "eval/medquad/corpus.jsonl.xz": None,
    "eval/medquad/queries.jsonl": None,
    "eval/medquad/qrels.tsv": None,
    "eval/xquad/corpus.jsonl": None,
    "eval/xquad/queries.jsonl": None,
    "eval/xquad/qrels.tsv": None,
}


def checked_bytes(source: Path, entry: dict[str, object]) -> bytes:
    """The file's bytes, decompressed, once its sum and its permission to ship are verified."""
    path = source / str(entry["file"])
    packed = path.read_bytes()
    digest = hashlib.sha256(packed).hexdigest()
    if digest != entry["sha256"]:
        raise SystemExit(f"{path}: expected SHA-256 {entry['sha256']}, got {digest}")
    if entry["ship"] is not True:
        raise SystemExit(f"{path}: the manifest does not let it ship")
    return lzma.decompress(packed) if path.suffix == ".xz" else packed


def spread(lines: list[bytes], keep: int | None) -> list[bytes]:
    """`keep` of the lines in their order, at equal distances; all of them for None."""
    if keep is None or keep >= len(lines):
        return lines
    return [lines[number * len(lines) // keep] for number in range(keep)]


def make(source: Path, target: Path) -> list[tuple[str, int, int]]:
    """Write every file of `CAPS` under `target`; (name, rows, bytes on disk) of each."""
    manifest = {entry["file"]: entry for entry in json.loads((source / "manifest.json").read_text(encoding="utf-8"))}
    written = []
    for name, keep in CAPS.items():
        if name not in manifest:
            raise SystemExit(f"{source / 'manifest.json'}: expected an entry for {name}, got none")
        content = checked_bytes(source, manifest[name])
        header = 1 if name.endswith(".tsv") else 0
        lines = content.splitlines(keepends=True)
        if len(lines) - header != manifest[name]["rows"]:
            raise SystemExit(f"{source / name}: expected {manifest[name]['rows']} rows, got {len(lines) - header}")
        rows = spread(lines, keep)
        kept = b"".join(rows)
        shipped = name if header else name.removesuffix(".xz") + ".xz"
        output = target / shipped
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(kept if header else lzma.compress(kept, preset=9 | lzma.PRESET_EXTREME))
        written.append((shipped, len(rows) - header, output.stat().st_size))
    return written


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    arguments = parser.parse_args()
    written = make(arguments.source, arguments.target)
    for name, rows, size in written:
        print(f"{name:36} {rows:>8,} rows {size:>11,} bytes")
    rows = sum(row[1] for row in written)
    total = sum(file.stat().st_size for file in arguments.target.rglob("*") if file.is_file())
    print(f"{'the whole folder':36} {rows:>8,} rows {total:>11,} bytes")
    if total >= LIMIT_BYTES:
        raise SystemExit(f"{arguments.target}: expected less than {LIMIT_BYTES:,} bytes, got {total:,}")


if __name__ == "__main__":
    main()
