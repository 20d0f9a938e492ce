"""Samples of a policy in training: sampled responses with every number of every token, and greedy ones next to SFT's.

A line of samples.jsonl is one sampled response {step, prompt, text, score, source_scores, kl, finished, tokens}, where
`tokens` has one list per column (see COLUMNS) with an entry for each token, with a critic {after}: the value after the
last token, without one {group}: the rewards of all responses to the prompt; or one fixed prompt {step, prompt, greedy,
before}: the greedy response now and before the stage. `tetrad explain` prints them. Three of each kind are written
every `eval_every` iterations.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from tetrad.distributed import collectives
from tetrad.inference.completions import EncodedPrompt
from tetrad.inference.engine import Request, generate
from tetrad.model.transformer import CausalLM
from tetrad.objectives import ppo
from tetrad.rl.minibatches import PolicyBatch, PPOBatch
from tetrad.rl.models import PolicyModels
from tetrad.rl.rollout import response_indices
from tetrad.settings.common import OnPolicy, Sampling
from tetrad.training.context import StageContext
from tetrad.training.step import timed
from tetrad.types import lines

SHOWN = 3
COLUMNS = ("ids", "pieces", "logprob", "reference", "kl", "reward", "advantage", "value", "return")
"""Of a token: its id and text, log-probability under actor and reference, their difference (nats), reward (-beta KL,
and the score at the last), advantage (PPO's whitened); with a critic the value before it, and the return."""


class Samples:
    """The first prompts of the stage are answered greedily each time; sampled responses are the iteration's own."""

    def __init__(self, ctx: StageContext, s: OnPolicy, models: PolicyModels, prompts: Sequence[EncodedPrompt]) -> None:
        self.ctx, self.s, self.models, self.fixed = ctx, s, models, list(prompts[:SHOWN])

    @timed("eval")
    def show(self, write: Callable[[dict[str, Any]], None], step: int, batch: PolicyBatch) -> None:
        """Sampled responses on the terminal and in samples.jsonl, and there the greedy ones too, decoded here."""
        say = self.ctx.console.say
        numbers = response_indices(self.s.batch_size, self.s.samples_per_prompt)[:SHOWN]
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
        sampling = Sampling(temperature=0.0, max_new_tokens=self.s.max_new_tokens)
        ends = model.config.eos_ids
        requests = [Request(q.ids, sampling, ((0, "greedy", 0, n),), ends) for n, q in enumerate(self.fixed)]
        responses = generate(model, requests, self.models.device, SHOWN)
        return [self.models.tokenizer.decode(response.ids) for response in responses]

    def _record(self, step: int, row: int, batch: PolicyBatch) -> dict[str, Any]:
        rollout, sample = batch.rollout, batch.rollout.samples[row]
        n = len(sample.response_ids)
        kl = ppo.kl_tokens(batch.logprobs, batch.ref_logprobs, rollout.mask_BT)
        arrays = [batch.logprobs, batch.ref_logprobs, kl, batch.rewards, batch.advantages]
        pieces = [self.models.tokenizer.decode((i,), keep_control=True) for i in sample.response_ids]
        first = row // self.s.samples_per_prompt * self.s.samples_per_prompt
        further: dict[str, Any] = {"group": batch.rewards[first : first + self.s.samples_per_prompt].sum(1).tolist()}
        if isinstance(batch, PPOBatch):
            arrays, further = [*arrays, batch.values, batch.returns], {"after": float(batch.bootstrap[row])}
        rounded = [[float(f"{x:.5g}") for x in array[row, :n].tolist()] for array in arrays]
        return {
            "step": step,
            "prompt": sample.prompt,
            "text": sample.text,
            "score": float(batch.scores[row]),
            "source_scores": {name: scores[row] for name, scores in batch.source_scores.items()},
            "kl": float(kl[row].sum()),
            "finished": sample.finished,
            **further,
            "tokens": dict(zip(COLUMNS, (list(sample.response_ids), pieces, *rounded), strict=False)),
        }
