"""The reward model's routes: one function scores for all of them, and gives what `tetrad score` gives."""

import asyncio
from collections.abc import Sequence

from starlette.routing import Route

from tetrad.inference.completions import Completion
from tetrad.reward.model import score_samples
from tetrad.server.guard import Refused
from tetrad.server.service import Service


async def scores(service: Service, samples: Sequence[Completion]) -> list[float]:
    """The reward of each sample's text, never of a part of it. Errors: E-DATA-LONG, E-NUM-NONFINITE; Refused without a
    reward model."""
    if service.reward is None:
        raise Refused(404, "no reward model is served", code="model_not_found")
    loop = asyncio.get_running_loop()
    return await loop.run_in_executor(service.scorer, score_samples, service.reward, samples)


def routes(service: Service) -> list[Route]:
    """The routes of this file."""
    return []
