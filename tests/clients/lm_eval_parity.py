"""lm-eval of a served model against lm-eval's own `hf` backend on the same folder: prints the largest difference.

Run by test_clients.py with the interpreter that TETRAD_CLIENTS names: URL, model's id, folder, folder for task files.
"""

import json
import random
import sys
import urllib.request
from pathlib import Path
from typing import Any

import lm_eval
from lm_eval.tasks import TaskManager

WORDS = "the plot is a warm and funny story with a dull ending what bright film slow but moving 电影 很好看".split()
CHOICES = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_target: answer
doc_to_choice: choices
target_delimiter: ""
metric_list: [{{metric: acc}}, {{metric: acc_norm}}]
"""
WRITING = """\
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: "{data}"}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{choices[0]}}}}"
generation_kwargs: {{until: ["a"], max_gen_toks: 24, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""


def likeliest(url: str, name: str, text: str) -> str:
    """The token that the model would say next, so that some choices are greedy ones."""
    body = {"model": name, "prompt": text, "max_tokens": 1, "temperature": 0, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as answer:
        said: str = json.load(answer)["choices"][0]["text"]
    return said if said.isprintable() and said.isascii() and said.strip() else "the"


def write_tasks(folder: Path, url: str, name: str) -> None:
    draw = random.Random(0)

    def text(least: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(least, 6)))

    rows: list[dict[str, Any]] = []
    for _ in range(24):
        question = text(1)
        choices = [likeliest(url, name, question), " " + text(1), " " + text(1)]
        rows.append({"question": question, "choices": choices, "answer": draw.randrange(3)})
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    for task, form in (("choosing", CHOICES), ("writing", WRITING)):
        (folder / f"{task}.yaml").write_text(form.format(name=task, data=data), encoding="utf-8")


def evaluate(kind: str, args: dict[str, Any], folder: Path) -> tuple[dict[str, Any], list[Any], list[str]]:
    """Metrics, (log-likelihood, greedy) of each choice, and texts."""
    result = lm_eval.simple_evaluate(
        kind,
        args,
        tasks=["choosing", "writing"],
        task_manager=TaskManager(include_path=str(folder), include_defaults=False),
        batch_size=8,
        device="cpu",
        log_samples=True,
        bootstrap_iters=0,
    )
    samples = result["samples"]
    pairs = [(float(one[0]), str(one[1]) == "True") for s in samples["choosing"] for (one,) in s["resps"]]
    texts = [s["resps"][0][0] for s in samples["writing"]]
    return dict(result["results"]), pairs, texts


def main() -> None:
    url, name, model, tasks = sys.argv[1:]
    folder = Path(tasks)
    write_tasks(folder, url, name)
    metrics, pairs, texts = evaluate("hf", {"pretrained": model, "dtype": "float32"}, folder)
    report: dict[str, Any] = {"metrics": metrics, "choices": len(pairs), "texts": len(set(texts)), "served": {}}
    report["greedy"] = sum(greedy for _, greedy in pairs)
    for tokenizer in ("huggingface", "remote"):
        args = {"model": name, "base_url": f"{url}/v1/completions", "tokenizer_backend": tokenizer, "max_length": 96}
        if tokenizer == "huggingface":
            args["tokenizer"] = model
        theirs, served, written = evaluate("local-completions", args, folder)
        report["served"][tokenizer] = {
            "largest": max(abs(a - b) for (a, _), (b, _) in zip(pairs, served, strict=True)),
            "greedy equal": all(a == b for (_, a), (_, b) in zip(pairs, served, strict=True)),
            "texts equal": texts == written,
            "metrics equal": all(
                abs(value - theirs[task][metric]) < 1e-4
                for task, values in metrics.items()
                for metric, value in values.items()
                if isinstance(value, float)
            ),
        }
    print("REPORT " + json.dumps(report))


main()
