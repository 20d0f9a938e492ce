"""The samples of PPO: sampled responses with every number of every token, and greedy ones next to the SFT model's.

A line of samples.jsonl is one sampled response {step, prompt, text, score, source_scores, kl, finished, after,
tokens}, where `tokens` has one list per column (see COLUMNS) with an entry for each token; or one fixed prompt {step,
prompt, greedy, before}: the greedy response now and before PPO. `tetrad explain` prints them. Three of each kind are
written every `ppo.eval_every` iterations.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from tetrad.distributed import collectives
from tetrad.inference.completions import EncodedPrompt
from tetrad.inference.engine import Request, generate
from tetrad.model.transformer import CausalLM
from tetrad.objectives import ppo
from tetrad.rl.minibatches import PPOBatch
from tetrad.rl.models import Models
from tetrad.rl.rollout import response_indices
from tetrad.settings.common import Sampling
from tetrad.training.context import StageContext
from tetrad.training.step import timed
from tetrad.types import lines

SHOWN = 3
COLUMNS = ("ids", "pieces", "logprob", "reference", "kl", "value", "reward", "advantage", "return")
"""Of a token: its id and text, log-probability under actor and reference, their difference (nats), the critic's value
before it, reward (-beta KL, and the score at the last), whitened advantage, return."""


class Samples:
    """The first prompts of the stage are answered greedily each time; sampled responses are the iteration's own."""

    def __init__(self, ctx: StageContext, models: Models, prompts: Sequence[EncodedPrompt]) -> None:
        self.ctx, self.models, self.fixed = ctx, models, list(prompts[:SHOWN])

    @timed("eval")
    def show(self, write: Callable[[dict[str, Any]], None], step: int, batch: PPOBatch) -> None:
        """Sampled responses on the terminal and in samples.jsonl, and there the greedy ones too, decoded here."""
        say = self.ctx.console.say
        numbers = response_indices(self.ctx.recipe.ppo.batch_size, self.ctx.recipe.ppo.samples_per_prompt)[:SHOWN]
        own = [(n, batch.rollout.samples[i].input, self._record(step, i, batch)) for i, n in enumerate(numbers)]
        # the first of the whole batch
        for _, text, record in sorted(collectives.gather(own), key=itemgetter(0))[:SHOWN]:
            write(record)
            say(f"  {text} |{record['text']}  (score {record['score']:+.2f}, KL {record['kl']:.1f})")
        now, before = self._greedy(self.models.actor), self._greedy(self.models.reference)
        for prompt, new, old in zip(self.fixed, now, before, strict=True):
            text = lines(prompt.prompt.turns)
            write({"step": step, "prompt": text, "greedy": new, "before": old})

    def _greedy(self, model: CausalLM) -> list[str]:
        model.eval()
        sampling = Sampling(temperature=0.0, max_new_tokens=self.ctx.recipe.ppo.max_new_tokens)
        ends = model.config.eos_ids
        requests = [Request(q.ids, sampling, ((0, "greedy", 0, n),), ends) for n, q in enumerate(self.fixed)]
        responses = generate(model, requests, self.models.device, SHOWN)
        return [self.models.tokenizer.decode(response.ids) for response in responses]

    def _record(self, step: int, row: int, batch: PPOBatch) -> dict[str, Any]:
        rollout, sample = batch.rollout, batch.rollout.samples[row]
        n = len(sample.response_ids)
        kl = ppo.kl_tokens(batch.logprobs, batch.ref_logprobs, rollout.mask_BT)
        arrays = (batch.logprobs, batch.ref_logprobs, kl, batch.values, batch.rewards, batch.advantages, batch.returns)
        rounded = [[float(f"{x:.5g}") for x in array[row, :n].tolist()] for array in arrays]
        pieces = [self.models.tokenizer.decode((i,), keep_control=True) for i in sample.response_ids]
        return {
            "step": step,
            "prompt": sample.prompt,
            "text": sample.text,
            "score": float(batch.scores[row]),
            "source_scores": {name: scores[row] for name, scores in batch.source_scores.items()},
            "kl": float(kl[row].sum()),
            "finished": sample.finished,
            "after": float(batch.bootstrap[row]),
            "tokens": dict(zip(COLUMNS, (list(sample.response_ids), pieces, *rounded), strict=True)),
        }
