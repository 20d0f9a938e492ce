"""Greedy tokens of a GGUF file in llama.cpp against Tetrad's, by hand: no test runs this.

    python -m venv llama && llama/bin/pip install xllamacpp==2026.10.11549
    python tests/parity/llama_cpp.py MODEL --python llama/bin/python [--template NAME] [--types f32 f16 q8_0]

For 50 prompts: llama.cpp is given the prompt's text and must have as many tokens of it as Tetrad; it responds greedily
by itself; and at every token of Tetrad's greedy response it is asked for its own next one. The script says how many
responses and ids are equal and the largest difference of a log-probability; exit 1 if f32 differs anywhere.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TOPICS = (
    "the sea",
    "a red bicycle",
    "3,141 stars",
    "Ana's café",
    "巴黎的冬天",
    "code: x += 1;\n\ty = 2",
    "naïve 🙂 jokes",
)
FORMS = (
    "Tell me about {}.",
    "What's {}?",
    "Write one line on {}",
    "请介绍一下{}。",
    "LIST: {}!!  (short)",
    "\n{}\n\n",
    "{} 2024",
)


def worker(gguf: str) -> None:
    """In the environment with llama.cpp: a request a line in, an answer a line out."""
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.verbosity = gguf, 1024, 1, 0
    params.cpuparams.n_threads = 1  # its threads wait for each other by spinning
    params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = xllamacpp.Server(params)
    for line in sys.stdin:
        answer = server.handle_completions({"temperature": 0, "n_predict": 1, "n_probs": 20, **json.loads(line)})
        print(json.dumps(answer), flush=True)


def greedy(model: str, template: str, tokens: int) -> list[dict[str, Any]]:
    """Tetrad's prompts and responses."""
    from tetrad.inference import policy
    from tetrad.settings.use import Sample

    loaded = policy.load(model, template)
    texts = [form.format(topic) for topic in TOPICS for form in FORMS] + ["Hello"]
    prompts = [policy.encode_prompt(loaded, policy.instruction_prompt(text)) for text in texts]
    settings = Sample(temperature=0.0, top_p=1.0, max_new_tokens=tokens)
    return [
        {
            "text": loaded.tokenizer.decode(group[0].prompt_ids, keep_control=True),
            "prompt": list(group[0].prompt_ids),
            "ids": list(group[0].response_ids),
            "logprobs": list(group[0].logprobs),
            "ends": loaded.ends,
            "says": [loaded.tokenizer.decode(group[0].response_ids[:n], partial=True) for n in range(tokens + 1)],
        }
        for group in policy.completions(loaded, prompts, settings)
    ]


@dataclass
class Counts:
    """Prompts of the same length, responses of the same text, ids compared and equal, the largest difference of a
    log-probability."""

    prompts: int = 0
    texts: int = 0
    ids: int = 0
    equal: int = 0
    gap: float = 0.0


def compare(python: str, gguf: Path, responses: list[dict[str, Any]]) -> Counts:
    """What llama.cpp says of Tetrad's responses."""
    command = [python, __file__, "--worker", str(gguf)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdin and process.stdout

        def ask(**request: Any) -> dict[str, Any]:
            assert process.stdin and process.stdout
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            return dict(json.loads(process.stdout.readline()))

        count = Counts()
        for row in responses:
            count.prompts += ask(prompt=row["text"])["usage"]["prompt_tokens"] == len(row["prompt"])
            text = ask(prompt=row["prompt"], n_predict=len(row["ids"]))["choices"][0]["text"]
            count.texts += text.rstrip("\ufffd") == row["says"][-1].rstrip("\ufffd")
            for place, (wanted, logprob) in enumerate(zip(row["ids"], row["logprobs"], strict=True)):
                new = row["says"][place + 1][len(row["says"][place]) :]
                if wanted not in row["ends"] and (not new or "\ufffd" in new):
                    continue  # no whole character, or a control token: the server reports none; texts are compared
                choice = ask(prompt=row["prompt"] + row["ids"][:place])["choices"][0]
                count.ids += 1
                if not choice["logprobs"]:  # an end token, of which nothing is reported
                    count.equal += choice["finish_reason"] == "stop" and wanted in row["ends"]
                    continue
                best = choice["logprobs"]["content"][0]["top_logprobs"]
                count.equal += best[0]["id"] == wanted
                theirs = {item["id"]: item["logprob"] for item in best}
                count.gap = max(count.gap, abs(theirs[wanted] - logprob) if wanted in theirs else float("inf"))
        process.stdin.close()
    return count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--python", default=sys.executable, help="of an environment with xllamacpp")
    parser.add_argument("--template", default="")
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--types", nargs="+", default=["f32", "f16", "q8_0"])
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        worker(given.model)
        return 0
    from tetrad.cli.main import main as tetrad

    responses, wrong = greedy(given.model, given.template, given.tokens), False
    for kind in given.types:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "model.gguf"
            template = ["--template", given.template] if given.template else []
            if tetrad(["export", given.model, "--gguf", str(file), "--type", kind, *template]):
                return 1
            count, all_ = compare(given.python, file, responses), len(responses)
        wrong |= count.prompts < all_ or (kind == "f32" and (count.texts < all_ or count.equal < count.ids))
        print(
            f"{kind}: {count.prompts} of {all_} prompts have as many tokens, {count.texts} responses are equal;", end=""
        )
        print(f" {count.equal} of {count.ids} ids ({count.equal / count.ids:.2%}); log-probs within {count.gap:.2g}")
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
