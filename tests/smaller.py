"""Lessons at a smaller size: what the lanes of a chapter write in place of sizes that only make its numbers steadier.

Every line of a chapter still runs, with fewer texts, steps and rounds; exercises, checks and wrong answers stay as they
are. At full size a chapter runs when `python -m labutils build` executes it.
"""

import re

from labutils.measurement.timing import MIN_REPEATS

SMALLER = {
    "00_start_here": {
        "prompt_ids, 8)": "prompt_ids, 1)",
        "NEW_TOKENS = 48": "NEW_TOKENS = 6",
        "CHARACTERS = 2000": "CHARACTERS = 200",
        "measure_roofline(2.0": "measure_roofline(0.1",
        "range(300)": "range(30)",
        "runs=9": "runs=1",
    },
    "01_how_generation_works": {
        "CHARACTERS = 2000": "CHARACTERS = 200",
        "NEW_TOKENS = 32": "NEW_TOKENS = 8",
        "speed_subject()": "speed_subject(num_hidden_layers=2)",
    },
    "03_quantizing_a_language_model": {
        "LIMIT_BYTES = 1000": "LIMIT_BYTES = 100",
        "held_out_dialogues()": "held_out_dialogues(bundles=5)",
        "count=40": "count=20",
        "code=8, dialogues=8": "code=4, dialogues=4",
        "[:255]": "[:63]",
        "ROWS, N = 16384, 8192": "ROWS, N = 512, 1024",
        "speed_subject(num_hidden_layers=6": "speed_subject(num_hidden_layers=1",
        "state_bits=7": "state_bits=4",
    },
    "04_pruning": {
        "limit_bytes=600": "limit_bytes=100",
        "code=8, dialogues=8, context=128, batch=16": "code=1, dialogues=1, context=64, batch=2",
        "dialogues=96": "dialogues=24",
        "code=48, dialogues=48": "code=8, dialogues=8",
        "steps=60": "steps=3",
        "for s in range(4)": "for s in range(1)",
        "num_hidden_layers=4": "num_hidden_layers=1",
        "rounds=25": "rounds=5",
        '"test", 315': '"test", 126',
    },
    "05_knowledge_distillation": {
        "limit_bytes=600": "limit_bytes=100",
        "steps=150": "steps=5",
        "steps=1500": "steps=5",
        "steps=200": "steps=5",
        "FitPlan(steps=8": "FitPlan(steps=3",
        "SEEDS, STEPS, EVERY = (0, 1, 2), 24, 8": "SEEDS, STEPS, EVERY = (0, 1), 4, 2",
        "STEPS_OF_DIET, schedule = 32": "STEPS_OF_DIET, schedule = 4",
        "lessons[:10]": "lessons[:2]",
        "0.05, 200)": "0.05, 12)",
        "1e-2, 200)": "1e-2, 12)",
    },
    "07_tpu_and_xla": {'["input_ids"][:100]': '["input_ids"][:60]'},
    "11_serving_many": {
        "COUNT = 20_000": "COUNT = 2_000",
        "4.0), 100, []": "4.0), 20, []",
        "vocab_size=4096)": "vocab_size=4096, num_hidden_layers=2)",
    },
    "12_applications": {
        "sounds[:6]": "sounds[:5]",
        "10_000": "1_000",
        '{"grammar": 8, "language model": 5}': '{"grammar": 5, "language model": 5}',
        "(40, 20, 10, 0)": "(40, 0)",
        "(8, 6, 4, 3, 2), (0.2, 0.4, 0.5, 0.6, 0.8)": "(8, 2), (0.2, 0.8)",
        "resamples=300": "resamples=20",
    },
}


ROUNDS, CALLS = re.compile(r"\b(repeats|rounds)=\d+"), re.compile(r"\bcalls_per_sample=\d+")


def smaller(stem: str, cells: dict[int, str]) -> tuple[dict[int, str], list[str]]:
    """The lessons' cells by place with smaller sizes and the fewest rounds, and the sizes that none of them has."""
    sizes = SMALLER.get(stem, {})
    unknown = [size for size in sizes if not any(size in cell for cell in cells.values())]
    for size, less in sizes.items():
        cells = {place: cell.replace(size, less) for place, cell in cells.items()}
    cells = {place: ROUNDS.sub(rf"\1={MIN_REPEATS}", cell) for place, cell in cells.items()}
    return {place: CALLS.sub("calls_per_sample=1", cell) for place, cell in cells.items()}, unknown
