"""`tetrad serve`: models and a reward model over HTTP."""

from collections.abc import Sequence

import uvicorn

from tetrad.console import Console
from tetrad.server import chat, completions, scoring, tokens
from tetrad.server.app import create_app
from tetrad.server.guard import Limits
from tetrad.server.service import load_service
from tetrad.settings.use import Serve


def serve(models: Sequence[str], settings: Serve, console: Console) -> int:
    """Serves until SIGTERM or Ctrl-C. Errors: E-CONF-*, E-MODEL-*, E-CKPT-*."""
    service = load_service(models, settings)
    app = create_app(
        service, Limits(), [route for part in (chat, completions, tokens, scoring) for route in part.routes(service)]
    )
    console.say(f"serving {', '.join(service.models)} at http://{settings.host}:{settings.port}")
    uvicorn.Server(uvicorn.Config(app, settings.host, settings.port, log_level="error", ws="none", http="h11")).run()
    return 0
