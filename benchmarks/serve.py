"""What HTTP costs: tokens a second of 32 streams through the server, beside the engine alone on the same prompts.

    python benchmarks/serve.py FOLDER [--streams 32] [--new 128] [--rounds 5]
    python benchmarks/serve.py FOLDER --peer URL     `transformers serve FOLDER` runs there already

The server, whose engine has a process of its own, and an engine in this process take turns; the clients are one other
process, which reads sockets and does little else. One JSON line has the tokens a second of each turn, the median of the
pairs' ratios, the seconds to the first token (p50, p99), the same ratio of tokens a second of processor time (of the
server and its engine; Linux), and the share of the processors that others took, clients and that engine included. Each
answer has `--new` tokens, whatever the model says; a peer's has as many as it says, at most that.
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


async def all_at_once(url: str, bodies: list[bytes]) -> list[tuple[float, int]]:
    host, port = url.removeprefix("http://").split(":")
    return await asyncio.gather(*(one(host, int(port), body) for body in bodies))


def client(url: str, model: str, new: int, streams: int, ours: bool) -> None:
    """Prints seconds, tokens and seconds to the first text."""
    form = {"model": model, "max_tokens": new, "stream": True, "stream_options": {"include_usage": True}}
    form |= {"temperature": 1, "top_p": 1} | ({"ignore_eos": True} if ours else {})
    messages = [[{"role": "user", "content": question}] for question in questions(streams)]
    bodies = [json.dumps(form | {"messages": one, "seed": n}).encode() for n, one in enumerate(messages)]
    began = time.perf_counter()
    answers = asyncio.run(all_at_once(url, bodies))
    seconds = time.perf_counter() - began
    print(json.dumps([seconds, sum(tokens for _, tokens in answers), [first for first, _ in answers]]))


def through(url: str, model: str, new: int, streams: int, ours: bool = True) -> tuple[float, int, list[float]]:
    line = [sys.executable, __file__, CLIENT, url, model, str(new), str(streams), str(int(ours))]
    seconds, tokens, firsts = json.loads(subprocess.run(line, capture_output=True, text=True, check=True).stdout)
    return seconds, tokens, firsts


def processor(pid: int) -> float:
    """Seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def alone(policy: Any, new: int, streams: int) -> int:
    """The tokens of the engine."""
    from tetrad.inference.engine import Request
    from tetrad.settings.use import Sample
    from tetrad.types import Turn

    sampling = Sample(temperature=1.0, top_p=1.0, max_new_tokens=new)
    engine = policy.engine(streams, min(policy.model.config.max_positions, 1024))
    for number, question in enumerate(questions(streams)):
        ids = policy.form.prompt(policy.tokenizer, [Turn("user", question)])
        engine.add(Request(tuple(ids), sampling, ((number, "generate", 0, 0),), ()))
    return sum(1 for _ in engine.events())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer", default="")
    given = parser.parse_args()
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
            for _ in range(given.rounds):
                clocks = [(time.perf_counter(), spent(model))]
                own = alone(policy, given.new, given.streams)
                clocks.append((time.perf_counter(), spent(model)))
                seconds, tokens, first = through(server.url, name, given.new, given.streams)
                clocks.append((time.perf_counter(), spent(model)))
                engines.append(own / (clocks[1][0] - clocks[0][0]))
                servers.append(tokens / seconds)
                work = [after[1] - before[1] for before, after in pairwise(clocks)]
                shares.append((tokens / work[1]) / (own / work[0]))
                firsts.extend(first)
                if given.peer:
                    seconds, tokens, first = through(
                        given.peer, str(given.folder), given.new, given.streams, ours=False
                    )
                    peers.append(tokens / seconds)
                    peer_firsts.extend(first)

    _, others = measured(rounds)
    ratios = [server / engine for server, engine in zip(servers, engines, strict=True)]
    line: dict[str, Any] = {"folder": given.folder.name, "streams": given.streams, "new": given.new}
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
        client(sys.argv[2], sys.argv[3], int(sys.argv[4]), int(sys.argv[5]), sys.argv[6] == "1")
    else:
        main()
