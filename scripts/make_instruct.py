"""Make the contradicting rows of `data/instruct/` from the sets of `data/`.

    python scripts/make_instruct.py data/

Every row is a query with both sides of a contradiction, as `pe/data/instruct.py` reads it. Choices are hashes of the
texts themselves, so the same sets and xz library give the same bytes, and a row depends on no other row.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import lzma
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pe.data.instruct import letters, read_instructions, read_rows
from pe.data.records import read_jsonl

Row = dict[str, Any]
T = TypeVar("T")

LIMIT_BYTES = 1_000_000
TRAIN_ROWS, EVAL_ROWS = 4_000, 400
HELD_OUT = 10
"""A premise in so many is held out for evaluation."""
PLAIN = "train/similar"
"""Rows of `train/nli` as they are, less what is held out: one instruction, without a contradiction."""
LURES = 3
"""A text of another domain is drawn from so many, or more at a tie, that share most words with the query."""

KINDS = {
    r"What is \(are\) (.+)": "what it is",
    r"Do you have information about (.+)": "what it is",
    r"What are the symptoms of (.+)": "symptoms",
    r"What are the treatments for (.+)": "treatments",
    r"What is the outlook for (.+)": "outlook",
    r"Who is at risk for (.+)": "who is at risk",
    r"What are the genetic changes related to (.+)": "genetic changes",
    r"How many people are affected by (.+)": "how many are affected",
    r"what research \(or clinical trials\) is being done for (.+)": "research",
    r"How to prevent (.+)": "prevention",
    r"How to diagnose (.+)": "diagnosis",
    r"What causes (.+)": "causes",
    r"What are the stages of (.+)": "stages",
    r"What are the complications of (.+)": "complications",
    r"Is (.+) inherited": "inheritance",
}
"""Wordings of MedQuAD's questions, and what each asks for; what is left is the disease."""

DOMAINS = {
    "banking": "freeze_account routing pin_change bill_due pay_bill account_blocked interest_rate min_payment "
    "bill_balance transfer order_checks balance spending_history transactions report_fraud",
    "credit cards": "replacement_card_duration expiration_date damaged_card improve_credit_score report_lost_card "
    "card_declined credit_limit_change apr redeem_rewards credit_limit rewards_balance application_status credit_score "
    "new_card international_fees",
    "kitchen and dining": "food_last confirm_reservation how_busy ingredients_list calories nutrition_info recipe "
    "restaurant_reviews restaurant_reservation meal_suggestion restaurant_suggestion cancel_reservation "
    "ingredient_substitution cook_time accept_reservations",
    "home": "what_song play_music todo_list_update reminder reminder_update calendar_update order_status "
    "update_playlist shopping_list calendar next_song order todo_list shopping_list_update smart_home",
    "auto and commute": "current_location oil_change_when oil_change_how uber traffic tire_pressure "
    "schedule_maintenance gas mpg distance directions last_maintenance gas_type tire_change jump_start",
    "travel": "plug_type travel_notification translate flight_status international_visa timezone exchange_rate "
    "travel_suggestion travel_alert vaccines lost_luggage book_flight book_hotel carry_on car_rental",
    "utility": "weather alarm date find_phone share_location timer make_call calculator definition "
    "measurement_conversion flip_coin spelling time roll_dice text",
    "work": "pto_request_status next_holiday insurance_change insurance meeting_schedule payday taxes income "
    "rollover_401k pto_balance pto_request w2 schedule_meeting direct_deposit pto_used",
    "small talk": "who_made_you meaning_of_life who_do_you_work_for do_you_have_pets what_are_your_hobbies fun_fact "
    "what_is_your_name where_are_you_from goodbye thank_you greeting tell_joke are_you_a_bot how_old_are_you "
    "what_can_i_ask_you",
    "meta": "change_speed user_name whisper_mode yes change_volume no change_language repeat change_accent cancel "
    "sync_device change_user_name change_ai_name reset_settings maybe",
}
"""Domains of CLINC150 and their intents, as its authors publish them (clinc/oos-eval, data/domains.json)."""
DOMAIN_OF = {intent: domain for domain, intents in DOMAINS.items() for intent in intents.split()}

BANKING = {
    "card_payment_fee_charged": ("card payment", "fee"),
    "card_payment_not_recognised": ("card payment", "not recognised"),
    "card_payment_wrong_exchange_rate": ("card payment", "wrong exchange rate"),
    "declined_card_payment": ("card payment", "refused"),
    "pending_card_payment": ("card payment", "pending"),
    "reverted_card_payment?": ("card payment", "reverted"),
    "cash_withdrawal_charge": ("cash withdrawal", "fee"),
    "cash_withdrawal_not_recognised": ("cash withdrawal", "not recognised"),
    "wrong_exchange_rate_for_cash_withdrawal": ("cash withdrawal", "wrong exchange rate"),
    "declined_cash_withdrawal": ("cash withdrawal", "refused"),
    "pending_cash_withdrawal": ("cash withdrawal", "pending"),
    "transfer_fee_charged": ("transfer", "fee"),
    "declined_transfer": ("transfer", "refused"),
    "failed_transfer": ("transfer", "refused"),
    "pending_transfer": ("transfer", "pending"),
    "top_up_by_card_charge": ("top-up", "fee"),
    "top_up_failed": ("top-up", "refused"),
    "pending_top_up": ("top-up", "pending"),
    "top_up_reverted": ("top-up", "reverted"),
    "direct_debit_payment_not_recognised": ("direct debit", "not recognised"),
    "exchange_charge": ("currency exchange", "fee"),
}
"""Banking77's intents that are a product and a problem with it."""


class Item(NamedTuple):
    """A text and the two properties that the sides of a contradiction ask for."""

    text: str
    first: str
    second: str


def number_of(*keys: str) -> int:
    """A hash of some texts, the same on every machine."""
    return int.from_bytes(hashlib.sha256("\0".join(keys).encode()).digest()[:8], "big")


def draw(choices: Sequence[T], *keys: str) -> T:
    """One of the choices, by a hash of the keys."""
    return choices[number_of(*keys) % len(choices)]


def sample(rows: Sequence[T], count: int, text: Callable[[T], str]) -> list[T]:
    """`count` of the rows, or all, by a hash of their text, in their order."""
    kept = sorted(range(len(rows)), key=lambda i: number_of("sample", text(rows[i])))[:count]
    return [rows[i] for i in sorted(kept)]


def row(query: str, **sides: Row) -> Row:
    return {"query": query, "sides": {name.replace("_", "-"): side for name, side in sides.items()}}


def side(right: str, wrong: list[str], shared: str | None = None, other: str | None = None) -> Row:
    """A side with its positive, its negatives and, where positives have some, the labels of `pe/data/instruct.py`."""
    labels = {"shared_label": shared, "other_label": other} if shared and other else {}
    return {"positive": right, "negatives": wrong, **labels}


def distinct(items: Iterable[T], text: Callable[[T], str]) -> list[T]:
    """The first item of each text, whatever its case and punctuation."""
    found: dict[str, T] = {}
    for item in items:
        found.setdefault(letters(text(item)), item)
    return list(found.values())


# NLI: an entailed and a contradicting hypothesis change places.


def nli(records: Sequence[Row]) -> tuple[list[Row], list[Row], list[Row]]:
    """Training and evaluation rows, no text of the one in the other; and the records without a text of evaluation."""
    usable = [record for record in records if record.get("negatives") and _differ(record)]
    held_out = [record for record in usable if number_of("premise", letters(record["query"])) % HELD_OUT == 0]
    held_out = distinct(held_out, lambda record: record["query"])
    seen = {letters(text) for record in held_out for text in _texts(record)}
    plain = [record for record in records if not seen & {letters(text) for text in _texts(record)}]
    train = [record for record in plain if record in usable]
    return [_nli_row(record) for record in train], [_nli_row(record) for record in held_out], plain


def _texts(record: Row) -> list[str]:
    return [record["query"], record["positive"], *record.get("negatives", ())]


def _differ(record: Row) -> bool:
    return len({letters(text) for text in _texts(record)}) == len(_texts(record))


def _nli_row(record: Row) -> Row:
    right, wrong = record["positive"], record["negatives"]
    return row(record["query"], nli_follows=side(right, wrong), nli_contradicts=side(wrong[0], [right]))


# MedQuAD and Banking77: two properties of a text; what shares one of them with the query differs in the other.


def crossed(items: Sequence[Item], sides: tuple[str, str], count: int) -> list[Row]:
    """Rows in which a text of the same first property and one of the same second change places."""
    by_first, by_second = defaultdict(list), defaultdict(list)
    for item in items:
        by_first[item.first].append(item)
        by_second[item.second].append(item)
    rows = []
    for item in items:
        first = [other for other in by_first[item.first] if other.second != item.second]
        second = [other for other in by_second[item.second] if _unrelated(other.first, item.first)]
        if first and second:
            one, two = draw(first, "first", item.text), draw(second, "second", item.text)
            like_first = side(one.text, [two.text], item.first, one.second)
            like_second = side(two.text, [one.text], item.second, two.first)
            rows.append(row(item.text, **{sides[0]: like_first, sides[1]: like_second}))
    return sample(rows, count, lambda made: str(made["query"]))


def _unrelated(one: str, other: str) -> bool:
    """Whether neither name holds all words of the other: 'leukemia' and 'childhood leukemia' are related."""
    ours, theirs = set(one.split()), set(other.split())
    return not (ours <= theirs or theirs <= ours)


def medical(questions: Iterable[str]) -> list[Item]:
    """Questions whose wording tells what is asked about which disease."""
    items = []
    for question in questions:
        for pattern, kind in KINDS.items():
            if match := re.fullmatch(rf"{pattern} \?", question):
                disease = " ".join(re.findall(r"\w+", match[1].casefold()))
                items.append(Item(question, disease, kind))
    return distinct(items, lambda item: item.text)


def banking(records: Iterable[Row]) -> list[Item]:
    items = [Item(record["text"], *BANKING[record["label"]]) for record in records if record["label"] in BANKING]
    return distinct(items, lambda item: item.text)


# CLINC150: intents lie within domains, so what is wrong under the domain is made to look like the query.


def clinc(records: Iterable[Row], count: int) -> list[Row]:
    """Rows whose text of another domain is one that shares many words with the query."""
    items = [Item(record["text"], record["label"], DOMAIN_OF[record["label"]]) for record in records]
    items = distinct(items, lambda item: item.text)
    by_intent, by_domain = defaultdict(list), defaultdict(list)
    for item in items:
        by_intent[item.first].append(item.text)
        by_domain[item.second].append(item)
    overlap = Overlap([item.text for item in items])
    domains = np.array([item.second for item in items])
    rows = []
    for item in sample(items, count, lambda item: item.text):
        same = [text for text in by_intent[item.first] if text != item.text]
        near = [other for other in by_domain[item.second] if other.first != item.first]
        shared = np.where(domains == item.second, -1, overlap.with_text(item.text))
        far = [items[i].text for i in np.flatnonzero(shared >= np.partition(shared, -LURES)[-LURES])]
        beside, within = draw(near, "not the intent", item.text), draw(near, "domain", item.text)
        intent = side(draw(same, "intent", item.text), [beside.text], item.first, item.second)
        domain = side(within.text, [draw(far, "not the domain", item.text)], item.second, within.first)
        rows.append(row(item.text, clinc_intent=intent, clinc_domain=domain))
    return rows


class Overlap:
    """Words that texts share, as a part of all words of both; counted in integers, so equal on every machine."""

    def __init__(self, texts: Sequence[str]) -> None:
        words = [set(text.casefold().split()) for text in texts]
        places: dict[str, list[int]] = defaultdict(list)
        for place, found in enumerate(words):
            for word in sorted(found):
                places[word].append(place)
        self.places = {word: np.array(found) for word, found in places.items()}
        self.sizes = np.array([len(found) for found in words])

    def with_text(self, text: str) -> np.ndarray:
        """`[N]`, of each text with one that is among them."""
        words = sorted(set(text.casefold().split()))
        shared = np.bincount(np.concatenate([self.places[word] for word in words]), minlength=len(self.sizes))
        return shared / (self.sizes + len(words) - shared)


def make(data: Path) -> dict[str, list[Row]]:
    """Rows by file below `data/instruct`."""
    train, test, plain = nli(read_jsonl(data / "train/nli.jsonl.xz"))
    questions = {
        "train": [record["query"] for record in read_jsonl(data / "train/medquad.jsonl.xz")],
        "eval": [record["text"] for record in read_jsonl(data / "eval/medquad/queries.jsonl.xz")],
    }
    requests = {
        "train": read_jsonl(data / "train/clinc150.jsonl.xz"),
        "eval": read_jsonl(data / "eval/clinc150_test.jsonl.xz"),
    }
    made = {"train/nli": train, "eval/nli": test, PLAIN: plain}
    for part, count in (("train", TRAIN_ROWS), ("eval", EVAL_ROWS)):
        made[f"{part}/medquad"] = crossed(medical(questions[part]), ("medquad_disease", "medquad_kind"), count)
        made[f"{part}/clinc150"] = clinc(requests[part], count)
    items = banking(read_jsonl(data / "eval/banking77_test.jsonl.xz"))
    made["eval/banking77"] = crossed(items, ("banking_product", "banking_problem"), EVAL_ROWS)
    return made


def write(rows: Iterable[Row], path: Path) -> None:
    content = "".join(json.dumps(made, ensure_ascii=False) + "\n" for made in rows).encode()
    packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME)
    if len(packed) >= LIMIT_BYTES:
        raise SystemExit(f"{path}: expected less than {LIMIT_BYTES:,} bytes, got {len(packed):,}")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(packed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder of the sets; what is made goes below its `instruct`")
    parser.add_argument("--output", type=Path, help="another folder to write to")
    arguments = parser.parse_args()
    target = arguments.output or arguments.data / "instruct"
    tasks = read_instructions(arguments.data / "instruct/instructions.yaml")
    for name, rows in make(arguments.data).items():
        path = target / f"{name}.jsonl.xz"
        write(rows, path)
        if name != PLAIN:
            read_rows(path, tasks)
        print(f"{name:16} {len(rows):>6,} rows {path.stat().st_size:>9,} bytes")


if __name__ == "__main__":
    main()
