"""What PPO shows of itself: sampled replies with every number of every token, and greedy ones beside the SFT model's.

A line of samples.jsonl is one sampled reply {step, prompt, text, score, parts, kl, ended, tokens}, where `tokens` has a
list a column (see COLUMNS) with an entry for each token of the reply; or one fixed prompt {step, prompt, greedy,
before}: the likeliest reply now and before PPO. `tetrad explain` prints them. It is bounded: three of each kind every
`ppo.eval_every` iterations.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from tetrad.distributed import collectives
from tetrad.inference.completions import EncodedPrompt
from tetrad.inference.engine import Request, generate
from tetrad.model.transformer import CausalLM
from tetrad.objectives import ppo
from tetrad.rl.experience import PPOBatch
from tetrad.rl.models import Models
from tetrad.rl.rollout import places
from tetrad.settings.common import Sampling
from tetrad.training.context import StageContext
from tetrad.types import lines

SHOWN = 3
COLUMNS = ("ids", "pieces", "logprob", "reference", "kl", "value", "reward", "advantage", "return")
"""Of a token: its id and text, log-probability under actor and reference, their difference (nats), the critic's value
before it, reward (-beta KL, and the score at the last), whitened advantage, return."""


class Samples:
    """The first prompts of the stage are asked again and again, greedily; sampled replies are the iteration's own."""

    def __init__(self, ctx: StageContext, models: Models, prompts: Sequence[EncodedPrompt]) -> None:
        self.ctx, self.models, self.fixed = ctx, models, list(prompts[:SHOWN])

    def show(self, keep: Callable[[dict[str, Any]], None], step: int, made: PPOBatch) -> None:
        """On the terminal and in samples.jsonl."""
        say = self.ctx.console.say
        numbers = places(self.ctx.recipe.ppo.batch_size, self.ctx.recipe.ppo.samples_per_prompt)[:SHOWN]
        own = [(n, made.rollout.samples[i].asked, self._record(step, i, made)) for i, n in enumerate(numbers)]
        for _, asked, record in sorted(collectives.gather(own), key=itemgetter(0))[
            :SHOWN
        ]:  # the first of the whole batch
            keep(record)
            say(f"  {asked} |{record['text']}  (score {record['score']:+.2f}, KL {record['kl']:.1f})")
        now, before = self._greedy(self.models.actor), self._greedy(self.models.reference)
        for question, new, old in zip(self.fixed, now, before, strict=True):
            asked = lines(question.prompt.turns)
            keep({"step": step, "prompt": asked, "greedy": new, "before": old})

    def _greedy(self, model: CausalLM) -> list[str]:
        model.eval()
        sampling = Sampling(temperature=0.0, max_new_tokens=self.ctx.recipe.ppo.max_new_tokens)
        ends = model.config.eos_ids
        requests = [Request(q.ids, sampling, ((0, "greedy", 0, n),), ends) for n, q in enumerate(self.fixed)]
        return [
            self.models.tokenizer.decode(reply.ids) for reply in generate(model, requests, self.models.device, SHOWN)
        ]

    def _record(self, step: int, row: int, made: PPOBatch) -> dict[str, Any]:
        rollout, sample = made.rollout, made.rollout.samples[row]
        n = len(sample.reply_ids)
        kl = ppo.kl_tokens(made.logprobs, made.ref_logprobs, rollout.mask_BT)
        arrays = (made.logprobs, made.ref_logprobs, kl, made.values, made.rewards, made.advantages, made.returns)
        numbers = [[float(f"{x:.5g}") for x in array[row, :n].tolist()] for array in arrays]
        pieces = [self.models.tokenizer.decode((i,), keep_control=True) for i in sample.reply_ids]
        return {
            "step": step,
            "prompt": sample.prompt,
            "text": sample.text,
            "score": float(made.scores[row]),
            "parts": {name: part[row] for name, part in made.parts.items()},
            "kl": float(kl[row].sum()),
            "finished": sample.finished,
            "after": float(made.bootstrap[row]),
            "tokens": dict(zip(COLUMNS, (list(sample.reply_ids), pieces, *numbers), strict=True)),
        }
