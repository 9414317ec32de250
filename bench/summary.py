"""What BENCHMARKS.md begins with, from the records alone: one table, one plot, and where PromptEmbedder loses."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench import plots, quality, records
from bench.markdown import NOT_YET, grid, hardware, several, share
from bench.memory import above
from bench.plots import Panel, Series
from bench.quality import Variants, match, mean_of, middle, newest, seconds_of, values
from bench.step_tables import measured, place, ratio, timed
from bench.systems import SYSTEMS
from bench.transfer import FOLLOWED

OURS, STORED, BEST = "pe-suffix-weighted", "pe-suffix-weighted-stored", "lora-packed"
"""Of the timed steps: the recipes' default, the same with all texts found in a store, and the quickest LoRA."""
STEPS = (
    ("smollm2", "cpu", OURS),
    ("smollm2", "cpu", STORED),
    ("1b", "cuda", OURS),
    ("8b", "cuda", OURS),
)
TRAININGS = ("pe-weighted", "pe-weighted-longer")
STATIC = "static-weighted"
POINTS = {
    "pe-weighted": "ours",
    "pe-weighted-longer": "ours, 4 times the steps",
    "static-weighted": "ours with learned prompts instead of a prompting LLM (control)",
    "lora-weighted-dropless": "LoRA without dropout",
    "lora-weighted-dropless-longer": "LoRA without dropout, 4 times the steps",
    "lora-last-layers": "LoRA without dropout, on the upper half of the layers",
}
REAL = ("smollm2-135m", "smollm2-135m until 2026-12-01")
"""The recipe of a real backbone, as it is and as it was when more tasks were scored."""
PLOT = "summary.svg"
LENGTHS = {"real": "texts of real lengths", "fixed": "texts of one length"}
HEADER = ("what", "hardware", "ours", "best LoRA", "times as fast", "memory, share of LoRA's", "score, share of LoRA's")


def step_row(case: str, device: str, variant: str, folder: Path) -> list[str] | None:
    """A step, on real text lengths where they were measured, if ours and the best LoRA were timed side by side."""
    groups = [group for group in measured("step", folder) if group[0]["case"] == case and group[0]["device"] == device]
    found = [of for of in map(timed, groups) if {variant, BEST} <= of.keys() and of[variant]["distribution"] in LENGTHS]
    if not found:
        return None
    chosen = max(found, key=lambda of: (of[variant]["distribution"] == "real", of[variant]["date"]))
    ours, lora = chosen[variant], chosen[BEST]
    beside = [row for group in measured("memory", folder) for row in group if place(row) == place(ours)]
    peaks = {row["variant"]: above(row["memory"]) for row in beside}
    what = f"one training step of *{case}* ({ours['sizes']['backbone']}), {LENGTHS[ours['distribution']]}"
    what += _in_bfloat16(ours)
    what += ", which a store had" if variant == STORED else ""
    times = [f"{row['ms']['median']:,.0f} ms" for row in (ours, lora)]
    return [what, hardware(ours), *times, ratio(lora, ours), share(peaks.get(BEST), peaks.get(variant)), ""]


def _in_bfloat16(row: records.Record) -> str:
    """A CPU's type, where it is not the usual one."""
    return ", in bfloat16" if row["device"] == "cpu" and row["dtype"] == "bfloat16" else ""


def training_row(name: str, model: str, variants: Variants) -> list[str] | None:
    """A whole training: its time beside the quickest LoRA as good as the best one, its score beside the best one's."""
    if not (found := match(name, variants)):
        return None
    rows = [variants[title][0]["quickest"] for title in (found.ours, found.quickest)]
    seconds = [float(row["cpu_seconds"]) for row in rows]
    ours, best, quickest = (mean_of(variants, title) or 0.0 for title in found)
    plain = [task for task in rows[0]["by_task"] if task != FOLLOWED]
    what = f"training of *{model}*, {rows[0]['steps']} steps, scored on {several(len(plain), 'task')}"
    what += _in_bfloat16(rows[0])
    cells = [
        f"{spent:,.0f} s, score {score:.1f}{_followed(variants[title])}"
        for title, spent, score in zip((found.ours, found.quickest), seconds, (ours, quickest), strict=True)
    ]
    machines = " and ".join(dict.fromkeys(map(hardware, rows)))
    return [what, machines, *cells, f"{seconds[1] / seconds[0]:.2f}", "", f"{ours / best:.0%} of {best:.1f}"]


def _followed(rows: Sequence[records.Record]) -> str:
    """How often the instruction was followed under unseen wordings, where that was scored; mean over the seeds."""
    found = [row["by_task"][FOLLOWED] for row in rows if FOLLOWED in row["by_task"]]
    return f", follows {sum(found) / len(found):.1f}" if found else ""


def scored(folder: Path) -> Variants:
    """The quality table's variants, of the recipe of small models with most of them; none where nothing was trained."""
    found = newest(folder)
    return max((variants for recipe, variants in found.items() if recipe not in REAL), key=len, default={})


def render(folder: Path) -> str:
    """The table: trainings of a real backbone, then steps and whole trainings of others."""
    tables, variants = newest(folder), scored(folder)
    found = [
        *(training_row(TRAININGS[0], "SmolLM2-135M", tables.get(name, {})) for name in REAL),
        *(step_row(*case, folder) for case in STEPS),
        training_row(TRAININGS[1], "tiny", variants),
    ]
    rows = [row for row in found if row]
    return grid(HEADER, rows) if rows else NOT_YET


def render_losses(folder: Path) -> str:
    """Where LoRA or the control is as good or better, and where that is not known: a line for each."""
    variants, lines = scored(folder), []
    short, longer = (match(name, variants) for name in TRAININGS)
    if short and longer:
        at = {
            title: f"{mean_of(variants, title):.1f} in {seconds_of(variants, title):,.0f} s"
            for title in (*short, *longer)
            if seconds_of(variants, title)
        }
        lines.append(
            f"**LoRA's long run without dropout scores higher**: {at[longer.quickest]}, ours {at[longer.ours]}. LoRA's"
            f" short run has {at[short.quickest]}."
        )
    faster = [row[4] for case in STEPS if case[1] != "cpu" and (row := step_row(*case, folder))]
    if faster:
        lora = [row for row in records.read("step", folder) if (row["variant"], row["device"]) == (BEST, "cuda")]
        known = {
            "steps on real text lengths": any(row["distribution"] == "real" for row in lora),
            "LoRA's memory": any((r["variant"], r["device"]) == (BEST, "cuda") for r in records.read("memory", folder)),
            "scores after training": any(row["device"] != "cpu" for rows in variants.values() for row in rows),
        }
        missing = ", ".join(what for what, there in known.items() if not there)
        lines.append(
            f"**Against the best LoRA on a GPU little is measured**: a step is {' and '.join(faster)} times as fast."
            + (f" Not measured: {missing}." if missing else "")
        )
    pair = [variants.get(SYSTEMS[name].title, []) for name in (STATIC, TRAININGS[0])]
    if all(pair):
        seen, unseen = ([f"{middle(values(rows, side)):.1f}" for rows in pair] for side in ("seen", "unseen"))
        lines.append(
            "**Static prompts are as good on the instructions of training**: without any prompting LLM, learned prompts"
            f" score {seen[0]} there, ours {seen[1]}; on instructions unseen in training {unseen[0]} and {unseen[1]}."
        )
    return "\n".join(f"- {line}" for line in lines) or NOT_YET


def draw(folder: Path, target: Path = plots.FOLDER) -> None:
    """Score against processor seconds of the six trainings of `POINTS`, with the spread over the seeds."""
    drawn = {item.label: item for item in quality.series(scored(folder))}
    titles = {SYSTEMS[name].title: label for name, label in POINTS.items()}
    found = [
        Series(label=label, x=drawn[title].x, y=drawn[title].y, y_range=drawn[title].y_range)
        for title, label in titles.items()
        if title in drawn
    ]
    if found:
        panel = Panel(x="processor seconds of training", y="mean score of all tasks", series=found, log="x")
        plots.points(target / PLOT, panel)
