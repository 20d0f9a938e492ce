"""What goes through the socket of an engine's process comes out as it was."""

import json
import math
import socket
import threading

import pytest

from tetrad.inference.engine import Request
from tetrad.inference.engine_process import HEAD, Part, _request, packed, part_of, received, request_json
from tetrad.settings.common import Sampling
from tetrad.settings.use import Sample

TOP = ((5, -0.1), (7, -math.inf))


def told(message: object) -> object:
    return json.loads(json.dumps(message))


def test_a_request() -> None:
    sampling = Sample(temperature=0.1 + 0.2, top_k=3, stop=("无",), max_new_tokens=9, presence_penalty=-0.5)
    keys = ((1 << 61, "generate", 0, 0), (1 << 61, "generate", 1, 0))
    request = Request((1, 2, 3), sampling, keys, (0, 9), ("无", "\n"), {4: -100.0, 0: 0.5}, 2)
    back = _request(told(request_json(request)))  # type: ignore[arg-type]
    plain = {name: getattr(sampling, name) for name in Sampling.__dataclass_fields__}
    assert vars(back) == vars(request) | {"sampling": Sampling(**plain)}


def test_a_part() -> None:
    for top in ((), (TOP, TOP)):
        part = Part(3, 1, "电影", (5, 7), (-0.1 / 3, -2.0), top, "stop")
        assert part_of(told(part)) == part  # type: ignore[arg-type]


def test_messages_of_any_size() -> None:
    """Also larger than the socket holds; nothing after the end is an end, not an error of JSON."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sent = [{"ready": True}, {"events": ["x" * (3 << 20)]}, {}]
        thread = threading.Thread(target=lambda: [theirs.sendall(packed(one)) for one in sent])
        thread.start()
        assert [received(ours) for _ in sent] == sent
        thread.join()
        theirs.sendall(packed(sent[0])[: HEAD + 3])
        theirs.shutdown(socket.SHUT_WR)
        with pytest.raises(EOFError):
            received(ours)
