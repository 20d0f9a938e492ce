"""What `tetrad serve` does under abuse: each row of a table with its figure.

    python benchmarks/serve_abuse.py                       # all rows, some three minutes
    python benchmarks/serve_abuse.py clients --seconds 10 --clients 200

Every row starts a server of its own with a tiny random model, on loopback and a free port, and stops it. All waits are
bounded; after `--limit` seconds everything ends. One JSON line a row. Memory is that of the server
and its engine (Linux).
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
MIB = 1 << 20
KEY = "k" * 32


@dataclass
class Server:
    """A process, and its port."""

    process: subprocess.Popen[str]
    port: int

    @property
    def memory(self) -> float:
        """Resident MiB, its engine's included."""
        pid = self.process.pid
        pids = [pid, *Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
        pages = sum(int(Path(f"/proc/{one}/statm").read_text().split()[1]) for one in pids)
        return pages * os.sysconf("SC_PAGE_SIZE") / MIB

    @property
    def cpu(self) -> float:
        """Seconds of processor time so far, all threads, without its engine."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def ask(self, method: str, path: str, body: Any = None, headers: str = "", seconds: float = 90) -> "Answer":
        """One request on a connection of its own; the time is from the last byte sent to the last received."""
        data = b"" if body is None else json.dumps(body).encode()
        head = f"{method} {path} HTTP/1.1\r\nConnection: close\r\n{headers}"
        if "Host:" not in headers:
            head += f"Host: localhost:{self.port}\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n"
        async with asyncio.timeout(seconds):
            reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
            try:
                writer.write(head.encode() + b"\r\n" + data)
                await writer.drain()
                sent = time.perf_counter()
                received = await reader.read()
            finally:
                writer.close()
        return Answer(int(received.split(b" ", 2)[1]), time.perf_counter() - sent, received)

    async def open_requests(self) -> float:
        text = (await self.ask("GET", "/metrics")).body.decode()
        return float(re.search(r"^tetrad_requests_open (\S+)", text, re.MULTILINE)[1])  # type: ignore[index]


@dataclass
class Answer:
    status: int
    seconds: float
    body: bytes = field(repr=False)


def chat(tokens: int, *, stream: bool = False) -> dict[str, Any]:
    messages = [{"role": "user", "content": "the plot is"}]
    return {"messages": messages, "max_tokens": tokens, "ignore_eos": True, "stream": stream}


def ms(seconds: list[float], share: float) -> float:
    """A quantile in milliseconds."""
    return round(1000 * sorted(seconds)[min(len(seconds) - 1, int(share * len(seconds)))], 1) if seconds else 0.0


async def clients(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Many at once, each with a request after the other; who gets 429 waits as long as it says."""
    await asyncio.gather(*(server.ask("POST", "/v1/chat/completions", chat(64)) for _ in range(40)))  # all slots once
    statuses, refused, accepted, health, late = Counter[int](), *(list[float]() for _ in range(4))
    before, peak, cpu, end = server.memory, 0.0, server.cpu, time.monotonic() + args.seconds
    failed = Counter[str]()

    async def client(number: int) -> None:
        await asyncio.sleep(number / args.clients)
        while time.monotonic() < end:
            try:
                answer = await server.ask("POST", "/v1/chat/completions", chat(16))
            except (OSError, TimeoutError, IndexError) as error:
                failed[type(error).__name__] += 1
                await asyncio.sleep(1)
                continue
            statuses[answer.status] += 1
            (refused if answer.status == 429 else accepted).append(answer.seconds)
            if answer.status == 429:
                wait = int(re.search(rb"retry-after: (\d+)", answer.body)[1])  # type: ignore[index]
                await asyncio.sleep((1 if args.impatient else wait) + random.random())

    async def watch() -> None:
        nonlocal peak
        while time.monotonic() < end:
            health.append((await server.ask("GET", "/health")).seconds)
            peak = max(peak, server.memory)
            asleep = time.perf_counter()
            await asyncio.sleep(0.1)
            late.append(time.perf_counter() - asleep - 0.1)

    await asyncio.gather(watch(), *(client(number) for number in range(args.clients)))
    return {
        "clients": args.clients,
        "impatient": args.impatient,
        "load": round(os.getloadavg()[0], 1),
        "cores": os.cpu_count(),
        "seconds": args.seconds,
        "statuses": dict(sorted(statuses.items())),
        "no answer": dict(failed),
        "429 ms p50, p99": (ms(refused, 0.5), ms(refused, 0.99)),
        "200 ms p50, p99": (ms(accepted, 0.5), ms(accepted, 0.99)),
        "health ms p50, p99": (ms(health, 0.5), ms(health, 0.99)),
        "of these the clients' own loop ms p50, p99": (ms(late, 0.5), ms(late, 0.99)),
        "processor s": round(server.cpu - cpu, 1),
        "MiB grown at the peak": round(peak - before, 1),
    }


async def headers(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Connections that send a byte of a header a second, beside normal clients."""

    async def normal(seconds: float) -> list[float]:
        times, end = list[float](), time.monotonic() + seconds

        async def one() -> None:
            while time.monotonic() < end:
                times.append((await server.ask("POST", "/v1/chat/completions", chat(8))).seconds)

        await asyncio.gather(*(one() for _ in range(10)))
        return times

    async def slow() -> float:
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        began = time.monotonic()
        with suppress(OSError):
            writer.write(b"GET /health HTTP/1.1\r\nX: ")
            while not reader.at_eof() and time.monotonic() - began < 30:
                writer.write(b"x")
                await writer.drain()
                with suppress(TimeoutError):
                    await asyncio.wait_for(reader.read(1), 1)
        writer.close()
        return time.monotonic() - began

    await normal(2)
    alone = await normal(10)
    cuts = [asyncio.create_task(slow()) for _ in range(args.slow)]
    await asyncio.sleep(1)
    beside = await normal(8)
    lasted = await asyncio.gather(*cuts)
    return {
        "slow connections": args.slow,
        "normal ms p50, p99 alone": (ms(alone, 0.5), ms(alone, 0.99)),
        "normal ms p50, p99 beside": (ms(beside, 0.5), ms(beside, 0.99)),
        "slow ones cut after s, least and most": (round(min(lasted), 1), round(max(lasted), 1)),
    }


async def bodies(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """A body of 1 GiB by length and in chunks, a header of 100 MiB: what is answered, and what it costs."""
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    await server.ask("POST", "/v1/chat/completions", chat(16))
    chunked, chunk = head + b"Transfer-Encoding: chunked\r\n\r\n", b"10000\r\n" + b" " * 65536 + b"\r\n"
    row: dict[str, Any] = {}
    for name, start, piece, total in (
        ("once, 2 MiB in chunks", chunked, chunk, 2 * MIB),  # what the first one costs, whatever its size
        ("1 GiB by length", head + f"Content-Length: {1 << 30}\r\n\r\n".encode(), b" " * 65536, 1 << 30),
        ("1 GiB in chunks", chunked, chunk, 1 << 30),
        ("header of 100 MiB", b"GET /health HTTP/1.1\r\nX: ", b"x" * 65536, 100 * MIB),
    ):
        before, peak, sent, began = server.memory, 0.0, 0, time.monotonic()
        reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
        first = asyncio.create_task(reader.read(12))
        with suppress(OSError):
            writer.write(start)
            while sent < total and time.monotonic() - began < 30:
                writer.write(piece)
                await writer.drain()
                sent += len(piece)
                peak = max(peak, server.memory)
        status = (await asyncio.wait_for(first, 10)).decode()[-3:]
        writer.close()
        row[name] = {"status": status, "MiB sent": sent // MIB, "MiB grown": round(peak - before, 2)}
        row[name]["seconds"] = round(time.monotonic() - began, 1)
    return row


async def streams(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Streams that their clients leave at random moments; then how long until none is open."""
    fresh, freed, before = [await first_token(server) for _ in range(20)], list[float](), 0.0
    for number in range(-8, args.streams // 25):  # the first 200 touch the memory that the server has for so many
        before = server.memory if number == 0 else before
        await asyncio.gather(*(left(server, random.random() * 0.5) for _ in range(25)))
        began = time.perf_counter()
        while await server.open_requests() > 0 and time.perf_counter() - began < 10:
            await asyncio.sleep(0.002)
        freed.append(time.perf_counter() - began)
    after = [await first_token(server) for _ in range(20)]
    return {
        "streams left": args.streams // 25 * 25,
        "none open after ms p50, p90, most": (ms(freed, 0.5), ms(freed, 0.9), ms(freed, 1)),
        "first token ms p50 before, after": (ms(fresh, 0.5), ms(after, 0.5)),
        "MiB grown": round(server.memory - before, 1),
    }


async def started(server: Server) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A stream that lasts longer than any client stays."""
    data = json.dumps(chat(1900, stream=True)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n")
    writer.write(f"Content-Length: {len(data)}\r\n\r\n".encode() + data)
    return reader, writer


async def first_token(server: Server) -> float:
    began = time.perf_counter()
    reader, writer = await started(server)
    while b'"content": "' not in (line := await asyncio.wait_for(reader.readline(), 30)) or b'"role"' in line:
        pass
    writer.close()
    return time.perf_counter() - began


async def left(server: Server, seconds: float) -> None:
    reader, writer = await started(server)
    with suppress(TimeoutError):
        await asyncio.wait_for(reader.read(-1), seconds)
    writer.transport.abort()


async def matrices(server: Server, args: argparse.Namespace) -> dict[str, Any]:
    """Keys, hosts and origins: how many of the wrong ones were answered with anything else than they should be."""
    wrong = ["", "Bearer ", f"Bearer {KEY[1:]}", f"Bearer {KEY}k", f"Token {KEY}", KEY, "Basic aWs6aWs=", "Bearer \xff"]
    paths = ("/v1/models", "/metrics", "/v1/chat/completions", "/v1/reward", "/tokenize", "/", "/nothing")
    cases = [(f"Authorization: {value}\r\n" if value else "", path, 401) for value in wrong for path in paths]
    right = f"Authorization: Bearer {KEY}\r\n"
    hosts = ("evil.example", "localhost.evil.example", "0.0.0.0", "169.254.169.254", "")
    cases += [(f"{right}Host: {host}\r\n", path, 403) for host in hosts for path in paths]
    for origin in (
        "Origin: http://evil.example",
        "Origin: null",
        "Sec-Fetch-Site: cross-site",
        "Sec-Fetch-Site: same-site",
    ):
        cases += [(f"{right}{origin}\r\n", path, 403) for path in paths]
    statuses = [((await server.ask("POST", path, {}, given)).status, status) for given, path, status in cases]
    good = await server.ask("GET", "/v1/models", None, right)
    amiss = [case[:2] for case, (got, due) in zip(cases, statuses, strict=True) if got != due]
    return {"cases": len(cases), "answered otherwise": amiss, "with the key": good.status}


ROWS: dict[str, Callable[[Server, argparse.Namespace], Awaitable[dict[str, Any]]]] = {
    "clients": clients,
    "headers": headers,
    "bodies": bodies,
    "streams": streams,
    "matrices": matrices,
}


def start(folder: Path, *, key: bool) -> Server:
    """Serves the tiny models; the end of this process ends it too."""
    words = [str(folder / "chat"), "--reward", str(folder / "reward"), "--port", "0"]
    command = [sys.executable, "-m", "tetrad", "serve", *words]
    environment = os.environ | ({"TETRAD_API_KEY": KEY} if key else {})
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout
    match = re.search(r"http://127.0.0.1:(\d+)", process.stdout.readline())
    if not match:
        raise SystemExit("the server did not start")
    return Server(process, int(match[1]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs="*", choices=[[], *ROWS], help="all of them by default")
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--impatient", action="store_true", help="who gets 429 comes back after a second all the same")
    parser.add_argument("--seconds", type=float, default=60)
    parser.add_argument("--slow", type=int, default=500)
    parser.add_argument("--streams", type=int, default=1000)
    parser.add_argument("--limit", type=int, default=600)
    args = parser.parse_args()
    from served import write_model

    signal.alarm(args.limit)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "chat", "chatml", max_positions=2048)
        write_model(folder / "reward", "chatml", reward=True)
        for row in args.rows or ROWS:
            server = start(folder, key=row == "matrices")
            try:
                print(json.dumps({"row": row, **asyncio.run(ROWS[row](server, args))}), flush=True)
            finally:
                server.process.send_signal(signal.SIGTERM)
                try:
                    code = server.process.wait(45)
                except subprocess.TimeoutExpired:
                    server.process.kill()
                    code = "killed"
            print(json.dumps({"row": row, "exit": code}), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
