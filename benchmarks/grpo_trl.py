"""What GRPO earns for the KL that it spends, against the GRPO of TRL at equal settings, on `examples/reviews-en`.

    python benchmarks/grpo_trl.py run RUN trl tetrad --seeds 0 1 2 >> results.jsonl     # with the extra `parity`
    python benchmarks/grpo_trl.py show results.jsonl

RUN and what is printed: as in ppo_trl.py. Both start from the same SFT model and score ids with the same reward
model; advantages, loss, clips, rates, schedule and batches are the same settings (docs/grpo.md). Each samples with its
own code, in its own order of prompts.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ppo_trl import BETA2, EPOCHS, EPS, LONGEST, LR, PARTS, PENALTY, PROMPTS, Curve, main, trained

from tetrad.data.source import Counts
from tetrad.inference.completions import read_encoded_prompts
from tetrad.inference.model_folder import model_folder
from tetrad.reward.model import load_reward
from tetrad.text.chat_template import choose
from tetrad.text.tokenizer import Tokenizer
from tetrad.types import Tokens

BATCH, SAMPLES, BETA = 8, 8, 0.2
RECIPE = """\
name = "grpo"
seed = {seed}
[run]
out = "{out}"
[model]
from = "{policy}"
[reward]
from = "{reward}"
[optim]
beta2 = {beta2}
[grpo]
prompts = ["{prompts}"]
steps = {steps}
batch_size = {batch}
samples_per_prompt = {samples}
max_new_tokens = {longest}
epochs = {epochs}
num_minibatches = {parts}
actor_lr = {lr}
adam_eps = {eps}
kl_coef = {beta}
missing_eos_penalty = {penalty}
reward_clip = 0
"""


def tetrad(run: Path, seed: int, steps: int) -> Curve:
    given = {"lr": LR, "beta": BETA, "batch": BATCH, "samples": SAMPLES, "epochs": EPOCHS, "parts": PARTS}
    given |= {"longest": LONGEST, "penalty": PENALTY, "beta2": BETA2, "eps": EPS, "seed": seed, "steps": steps}
    return trained(run, "grpo", RECIPE, given)


def trl(run: Path, seed: int, steps: int) -> Curve:
    from datasets import Dataset
    from transformers import AutoTokenizer, set_seed
    from trl import GRPOConfig, GRPOTrainer

    set_seed(seed)
    policy, reward_model = model_folder(run / "sft"), load_reward(run / "reward", device="cpu")
    form, tokenizer = choose(policy, "instruction", own=True), Tokenizer.load(policy)
    questions = read_encoded_prompts([PROMPTS], form, tokenizer, Counts(), 512, LONGEST)
    ids, end = [list(question.ids) for question in questions], form.end_id(tokenizer)
    curve: Curve = {name: [] for name in ("kl", "score", "finished", "length")}

    def reward(prompts: list[str], completion_ids: list[list[int]], **_: Any) -> list[float]:
        texts = [
            np.array(ids[int(p)] + response, np.int32) for p, response in zip(prompts, completion_ids, strict=True)
        ]
        scores = reward_model.scores([Tokens(text, np.zeros(len(text), np.bool_)) for text in texts]).mean(0)
        finished = np.array([response[-1] == end for response in completion_ids])
        for name, values in (("score", scores), ("finished", finished), ("length", list(map(len, completion_ids)))):
            curve[name].append(round(float(np.mean(values)), 4))
        return (scores - PENALTY * ~finished).tolist()  # type: ignore[no-any-return]

    class Trainer(GRPOTrainer):  # type: ignore[misc]
        def _tokenize_prompts(self, prompts: list[str]) -> tuple[Any, ...]:
            return [ids[int(p)] for p in prompts], None, {}

        def _generate_and_score_completions(self, inputs: Any) -> dict[str, Any]:
            """KL as here: the sum over a response of log pi - log pi_ref, before any step on it."""
            batch = super()._generate_and_score_completions(inputs)
            mask, length = batch["completion_mask"], batch["completion_ids"].shape[1]
            text = torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1)
            seen = torch.cat([batch["prompt_mask"], mask], 1)
            with torch.no_grad():
                logprobs, *_ = self._get_per_token_logps_and_entropies(self.model, text, seen, length)
            nats = ((logprobs - batch["ref_per_token_logps"]) * mask).sum(1)
            curve["kl"].append(round(nats.mean().item(), 4))
            return batch  # type: ignore[no-any-return]

    with tempfile.TemporaryDirectory() as out:
        how = GRPOConfig(
            output_dir=out,
            per_device_train_batch_size=BATCH * SAMPLES // PARTS,
            gradient_accumulation_steps=1,
            steps_per_generation=PARTS,
            num_generations=SAMPLES,
            num_iterations=EPOCHS,
            max_steps=steps * PARTS * EPOCHS,
            max_completion_length=LONGEST,
            temperature=1.0,
            top_k=0,
            beta=BETA,
            use_bias_correction_kl=False,
            loss_type="grpo",
            scale_rewards="group",
            learning_rate=LR,
            lr_scheduler_type="linear",
            adam_beta2=BETA2,
            adam_epsilon=EPS,
            max_grad_norm=1.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
            logging_strategy="no",
            seed=seed,
        )
        rows = Dataset.from_list([{"prompt": str(row)} for row in range(len(ids))])
        words = AutoTokenizer.from_pretrained(policy, padding_side="left")
        Trainer(str(policy), reward_funcs=reward, args=how, train_dataset=rows, processing_class=words).train()
    return curve


if __name__ == "__main__":
    main({"tetrad": tetrad, "trl": trl}, __doc__)
