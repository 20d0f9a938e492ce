"""`tetrad serve`: models and a reward model over HTTP."""

import os
import socket
import stat
from collections.abc import Sequence
from pathlib import Path

from tetrad.console import Console
from tetrad.errors import UserError
from tetrad.server import chat, completions, metrics, rank_app, scoring, tokens
from tetrad.server.app import create_app
from tetrad.server.guard import Limits, is_loopback
from tetrad.server.listen import Server
from tetrad.server.service import load_service
from tetrad.settings.use import Serve

KEY = "TETRAD_API_KEY"
_SHORTEST_KEY = 16


def serve(models: Sequence[str], settings: Serve, console: Console) -> int:
    """Serves until SIGTERM or Ctrl-C. Errors: E-CONF-*, E-MODEL-*, E-CKPT-*."""
    limits = limits_for(settings.host, settings.api_key_file, settings.max_num_seqs, settings.max_body_mib)
    check_free(settings.host, settings.port)
    service = load_service(models, settings)
    routes = [route for part in (chat, completions, tokens, scoring, metrics) for route in part.routes(service)]
    routes += rank_app.chat_routes(service)
    served = ", ".join([*service.models, *(["a reward model"] if service.reward else [])])

    def started(port: int) -> None:
        shown = f"[{settings.host}]" if ":" in settings.host else settings.host
        key = "with the key" if limits.keys else "without a key, from this computer only"
        console.say(f"serving {served} at http://{shown}:{port}, {key}")

    workers = [model.worker for model in service.models.values()]
    Server(create_app(service, limits, routes), settings.host, settings.port, started, workers).run()
    return 0


def limits_for(host: str, key_file: str, slots: int = 0, body_mib: int = 1) -> Limits:
    """What is let in at this address. Errors: E-CONF-MISSING without a key where other computers can connect."""
    key, loopback = read_key(key_file), is_loopback(host)
    if not (key or loopback):
        hint = f"add --api-key-file FILE (mode 0600), or set {KEY}"
        raise UserError(
            "E-CONF-MISSING", f"a server that others can reach needs a key: {host}", where="--host", hint=hint
        )
    return Limits(frozenset({key} if key else ()), loopback, requests=64 + slots, body=body_mib << 20)


def read_key(path: str) -> bytes:
    """The key of the file, else of the environment; empty without one. Errors: E-CONF-SECRET, E-CONF-RANGE."""
    key = os.environ.get(KEY, "").encode(errors="surrogateescape")
    if path:
        try:
            mode, key = Path(path).stat().st_mode, Path(path).read_bytes()
        except OSError as error:
            raise UserError("E-CONF-SECRET", f"the key can't be read: {error.strerror}", where=path) from None
        if not stat.S_ISREG(mode) or mode & 0o077:
            raise UserError("E-CONF-SECRET", "others can read this key", where=path, hint=f"chmod 600 {path}")
    key = key.strip()
    if (key or path) and not (len(key) >= _SHORTEST_KEY and all(33 <= c < 127 for c in key)):
        what = f"a key has at least {_SHORTEST_KEY} letters, digits or signs, no spaces"
        raise UserError("E-CONF-RANGE", what, where=path or KEY, hint="make one: openssl rand -hex 24")
    return key


def check_free(host: str, port: int) -> None:
    """Before the models are loaded. Errors: E-CONF-CONFLICT."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        what = f"{host}:{port} can't be listened at: {error.strerror}"
        raise UserError("E-CONF-CONFLICT", what, where="--port", hint="choose another --port or --host") from None
