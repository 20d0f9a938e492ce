"""What HTTP costs: tokens a second of 32 streams through the server, beside the engine alone on the same prompts.

    python benchmarks/serve.py FOLDER [--streams 32] [--new 128] [--turns 1] [--rounds 5] [--apart]
    python benchmarks/serve.py FOLDER --peer URL     `transformers serve FOLDER` runs there already

The server, whose engine has a process of its own, and an engine in this process take turns; the clients are one other
process, which reads sockets and does little else. One JSON line has the tokens a second of each turn, the median of the
pairs' ratios, the seconds to the first token (p50, p99), the same ratio of tokens a second of processor time (of the
server and its engine; Linux), and the share of the processors that others took, clients and that engine included. Each
answer has `--new` tokens, whatever the model says; a peer's has as many as it says, at most that. With `--turns` there
are so many requests for each stream, answers have half to one and a half times `--new` tokens, each stream asks again
when it is answered, and the engine alone has all requests from the start. With `--apart` an engine has a processor of
its own, and one thread, in both turns; server and clients have another (Linux): what is left is what HTTP costs the
engine, without the processors that they take.
"""

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from clock import measured

CLIENT = "--client"
WORDS = "the plot is a warm and funny story with a dull ending what a bright film slow but moving".split()


def lengths(new: int, count: int, turns: int) -> list[int]:
    """Of the answers: alike if they all begin together, else their mean is."""
    if turns == 1:
        return [new] * count
    return np.random.default_rng(5).integers(new // 2, new + new // 2 + 1, count * turns).tolist()


def questions(count: int) -> list[str]:
    """Of 4 to 60 words."""
    draw = np.random.default_rng(3)
    return [" ".join(draw.choice(WORDS, int(length))) for length in draw.integers(4, 60, count)]


async def one(host: str, port: int, body: bytes) -> tuple[float, int]:
    """Seconds to the first text, and the tokens of the answer."""
    reader, writer = await asyncio.open_connection(host, port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Type: application/json\r\n"
    began = time.perf_counter()
    writer.write(f"{head}Content-Length: {len(body)}\r\nConnection: close\r\n\r\n".encode() + body)
    first, said = 0.0, b""
    while part := await reader.read(1 << 16):
        said += part
        if not first and b'"content"' in said.replace(b'"content": ""', b"").replace(b'"content":""', b""):
            first = time.perf_counter() - began
    writer.close()
    lines = [line for line in said.split(b"\n") if line.startswith(b"data: {")]
    if not lines or b'"error"' in lines[-1]:
        raise SystemExit(said[-500:].decode())
    usage = json.loads(lines[-1][6:]).get("usage")
    return first, usage["completion_tokens"] if usage else sum(b'"content":' in line for line in lines)


async def all_at_once(url: str, bodies: list[bytes], streams: int) -> list[tuple[float, int]]:
    """So many at a time."""
    host, port = url.removeprefix("http://").split(":")
    left = iter(bodies)

    async def stream() -> list[tuple[float, int]]:
        return [await one(host, int(port), body) for body in left]

    streamed = await asyncio.gather(*(stream() for _ in range(streams)))
    return [answer for answers in streamed for answer in answers]


def client(url: str, model: str, new: int, streams: int, ours: bool, turns: int) -> None:
    """Prints seconds, tokens and seconds to the first text."""
    form = {"model": model, "stream": True, "stream_options": {"include_usage": True}}
    form |= {"temperature": 1, "top_p": 1} | ({"ignore_eos": True} if ours else {})
    messages = [[{"role": "user", "content": question}] for question in questions(streams * turns)]
    most = lengths(new, streams, turns)
    bodies = [
        json.dumps(form | {"messages": m, "seed": n, "max_tokens": most[n]}).encode() for n, m in enumerate(messages)
    ]
    began = time.perf_counter()
    answers = asyncio.run(all_at_once(url, bodies, streams))
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, sum(tokens for _, tokens in answers), [first for first, _ in answers]]))


def through(
    url: str, model: str, new: int, streams: int, ours: bool = True, turns: int = 1
) -> tuple[float, int, list[float]]:
    line = [sys.executable, __file__, CLIENT, url, model, *map(str, (new, streams, int(ours), turns))]
    seconds, tokens, firsts = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return seconds, tokens, firsts


def processor(pid: int) -> float:
    """Seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def pin(pid: int, cpu: int) -> None:
    """All threads of a process."""
    for thread in Path(f"/proc/{pid}/task").iterdir():
        os.sched_setaffinity(int(thread.name), {cpu})


def alone(policy: Any, new: int, streams: int, turns: int) -> int:
    """The tokens of the engine."""
    from tetrad.inference.engine import Request
    from tetrad.settings.use import Sample
    from tetrad.types import Turn

    most = lengths(new, streams, turns)
    engine = policy.engine(streams, min(policy.model.config.max_positions, 1024))
    for number, question in enumerate(questions(streams * turns)):
        sampling = Sample(temperature=1.0, top_p=1.0, max_new_tokens=most[number])
        ids = policy.form.prompt(policy.tokenizer, [Turn("user", question)])
        engine.add(Request(tuple(ids), sampling, ((number, "generate", 0, 0),), ()))
    return sum(1 for _ in engine.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--turns", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", default="")
    parser.add_argument("--apart", action="store_true")
    given = parser.parse_args()
    if given.apart:
        os.environ["OMP_NUM_THREADS"] = "1"
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from serving import serving
    from tetrad.inference.policy import load
    from tetrad.server.service import Served
    from tetrad.settings.use import Serve

    engines, servers, shares, firsts, peers, peer_firsts = [], [], [], [], [], []
    settings = Serve(max_num_seqs=given.streams, max_model_len=1024)

    policy = load(given.folder)

    def spent(model: Served) -> float:
        return time.process_time() + processor(model.worker.process.pid or 0)

    def rounds() -> None:
        with serving([given.folder], settings) as server:
            ((name, model),) = server.service.models.items()
            through(server.url, name, 8, given.streams)
            if given.apart:
                pin(model.worker.process.pid or 0, 0)
            for _ in range(given.rounds):
                clocks = [(time.perf_counter(), spent(model))]
                if given.apart:
                    pin(os.getpid(), 0)
                own = alone(policy, given.new, given.streams, given.turns)
                clocks.append((time.perf_counter(), spent(model)))
                if given.apart:
                    pin(os.getpid(), 1)
                answered = through(server.url, name, given.new, given.streams, turns=given.turns)
                seconds, tokens, first = answered
                clocks.append((time.perf_counter(), spent(model)))
                engines.append(own / (clocks[1][0] - clocks[0][0]))
                servers.append(tokens / seconds)
                work = [after[1] - before[1] for before, after in pairwise(clocks)]
                shares.append((tokens / work[1]) / (own / work[0]))
                firsts.extend(first)
                if given.peer:
                    seconds, tokens, first = through(
                        given.peer, str(given.folder), given.new, given.streams, False, given.turns
                    )
                    peers.append(tokens / seconds)
                    peer_firsts.extend(first)

    _, others = measured(rounds)
    ratios = [server / engine for server, engine in zip(servers, engines, strict=True)]
    line: dict[str, Any] = {
        "folder": given.folder.name,
        "streams": given.streams,
        "new": given.new,
        "turns": given.turns,
        "apart": given.apart,
    }
    line |= {"engine": engines, "server": servers, "ratio": statistics.median(ratios)}
    line |= {"ratio by processor": statistics.median(shares), "first": percentiles(firsts)}
    if peers:
        line |= {"peer": peers, "peer first": percentiles(peer_firsts)}
        line["over peer"] = statistics.median(s / p for s, p in zip(servers, peers, strict=True))
    print(json.dumps(line | {"others": others}, default=lambda x: round(float(x), 4)))


def percentiles(seconds: list[float]) -> list[float]:
    """p50 and p99."""
    return [round(float(np.percentile(seconds, share)), 4) for share in (50, 99)]


if __name__ == "__main__":
    if sys.argv[1:2] == [CLIENT]:
        client(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "1", int(sys.argv[7]))
    else:
        main()
