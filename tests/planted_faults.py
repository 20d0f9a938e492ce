"""Faults to plant: each point of PPO's checklist and each fault that known systems had, as a change of one place in
the source, and the test that must fail for it.

    python tests/planted_faults.py [NUMBER ...]      plants them one by one in a copy and prints what failed

`conformance/test_faults.py` sees to it that every place is still there.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PPO, OPTIONS = "conformance/test_ppo.py", "conformance/test_ppo_options.py"
CHAT, TEXT, FIELDS, WORKER = (f"unit/server/test_{name}.py" for name in ("chat", "completions", "fields", "worker"))


@dataclass(frozen=True)
class Fault:
    """item: what is planted; file: in src/tetrad; old, new: the change; test: in tests, as pytest names it."""

    item: str
    file: str
    old: str
    new: str
    test: str


FAULTS = (
    Fault(
        "1 the mask hides the end token, as ids != pad does",
        "rl/rollout.py",
        "< lengths[:, None]",
        "< lengths[:, None] - torch.tensor([s.finished for s in samples])[:, None].long()",
        f"{PPO}::test_layout_of_a_rollout",
    ),
    Fault(
        "2 positions run on through a pack",
        "data/pack.py",
        "np.arange(len(ids)) - np.repeat(ends - lengths, lengths)",
        "np.arange(len(ids)) + np.repeat(ends - lengths, lengths)",
        "unit/data/test_pack.py::test_a_label_is_the_next_token_of_the_same_document",
    ),
    Fault(
        "2 documents of a pack see each other",
        "model/transformer.py",
        "plan_for(packed.bounds, x.device, packed.prefixes, packed.offsets)",
        "plan_for((0, packed.bounds[-1]), x.device, packed.prefixes)",
        "conformance/test_losses.py::test_documents_of_a_pack_do_not_see_each_other",
    ),
    Fault(
        "3 log-probabilities at another temperature than sampling",
        "rl/rollout.py",
        'model(packed, "logprobs", temperature)[0]',
        'model(packed, "logprobs", 1.0)[0]',
        f"{PPO}::test_sampling_and_logprobs_have_one_temperature",
    ),
    Fault(
        "4 replies are scored by their text, not as sampled",
        "reward/model.py",
        "np.asarray(s.prompt_ids + s.response_ids, np.int32)",
        "np.asarray((s.prompt_ids + tuple(3 + ord(c) % 9 for c in s.text) + s.response_ids)"
        "[: len(s.prompt_ids + s.response_ids)], np.int32)",
        f"{PPO}::test_replies_are_scored_as_sampled",
    ),
    Fault(
        "5 the penalty for a cut reply is paid before the clip",
        "objectives/ppo.py",
        "    scores = (scores_B - mean) / std\n",
        "    scores = (scores_B - mean) / std - eos_penalty * missing_eos_B\n    eos_penalty = 0.0\n",
        f"{PPO}::test_missing_end_is_paid_after_the_clip",
    ),
    Fault(
        "6 a long prompt is cut on the right",
        "inference/completions.py",
        "tokens.ids[-most:]",
        "tokens.ids[:most]",
        "unit/rl/test_rollout.py::test_long_prompts_lose_their_beginning_or_go",
    ),
    Fault(
        "7 log-softmax in half precision",
        "objectives/language.py",
        "return torch.float64 if dtype == torch.float64 else torch.float32",
        "return dtype",
        "unit/objectives/test_language.py::test_sixteen_bit_states_keep_a_float32_loss_and_weight_gradient",
    ),
    Fault(
        "8 old log-probabilities are the sampler's",
        "train/ppo.py",
        "logprobs = read_logprobs(models.actor, *inputs, s.temperature)",
        "logprobs = rollout.sampler_logprobs_BT",
        f"{PPO}::test_kl_to_the_reference_starts_at_exactly_nothing",
    ),
    Fault(
        "9 dropout stays on in a forward",
        "rl/rollout.py",
        "    critic.eval()\n",
        "",
        f"{PPO}::test_dropout_is_off_in_all_four",
    ),
    Fault(
        "10 the head begins with another spread",
        "model/transformer.py",
        "(hidden_size + 1) ** -0.5",
        "0.02",
        "unit/model/test_transformer.py::test_initial_head",
    ),
    Fault(
        "11 a long list counts for more than a short one",
        "objectives/preference.py",
        "weights = amount[lists, first, second] / amount.sum((1, 2))[lists]",
        "weights = amount[lists, first, second]",
        "unit/objectives/test_preference.py::test_pairs_are_all_pairs_and_weigh_one_a_list",
    ),
    Fault(
        "12 training never stops early",
        "training/early_stopping.py",
        "return 0 < self.patience <= self.waited",
        "return False",
        "unit/train/test_reward.py::test_training_stops_where_the_validation_loss_stops_improving",
    ),
    Fault(
        "13 PPO takes the reward's scale on trust",
        "train/ppo.py",
        "if step == 0:",
        "if step < 0:",
        "unit/train/test_ppo_stage.py::test_another_scale_on_ppos_own_prompts_is_told",
    ),
    Fault(
        "13 the reward's mean is not taken off",
        "reward/assessment.py",
        "member.bias.copy_((member.bias - mean) * gain)",
        "member.bias.copy_(member.bias * gain)",
        "unit/train/test_chain.py::test_the_reward_is_normalised_on_replies_to_its_held_out_prompts",
    ),
    Fault(
        "14 margins are ignored",
        "objectives/preference.py",
        "gap = gap - margins_P",
        "gap = gap - 0 * margins_P",
        "unit/objectives/test_preference.py::test_weighted_pairs_take_margins_labels_and_competence",
    ),
    Fault(
        "15 centring draws the difference to 0, not the sum",
        "objectives/preference.py",
        "rewards_N[winners_P] + rewards_N[losers_P]",
        "rewards_N[winners_P] - rewards_N[losers_P]",
        "conformance/test_losses.py::test_reward_loss_by_hand",
    ),
    Fault(
        "16 the table by annotator is by file",
        "reward/evaluation.py",
        '"annotator": lambda record: record.annotator',
        '"annotator": _source',
        "unit/reward/test_evaluation.py::test_slices",
    ),
    Fault(
        "17 the score lands on the first token",
        "objectives/ppo.py",
        "after = mask_BT.flip(-1).cumsum(-1).flip(-1)",
        "after = mask_BT.cumsum(-1)",
        f"{PPO}::test_score_lands_on_the_last_token_and_moves_with_the_end",
    ),
    Fault(
        "17 KL is averaged over tokens, not summed",
        "objectives/ppo.py",
        "rewards = -beta * select(kl_BT, mask_BT)",
        "rewards = -beta * select(kl_BT, mask_BT) / mask_BT.sum(-1, keepdim=True)",
        f"{PPO}::test_kl_is_summed_over_tokens",
    ),
    Fault(
        "18 the KL coefficient has no effect",
        "rl/rewards.py",
        "return ppo.shape_rewards(scores, kl, rollout.mask_BT, beta)",
        "return ppo.shape_rewards(scores, kl, rollout.mask_BT, 0.05)",
        f"{PPO}::test_kl_coefficient_has_an_effect",
    ),
    Fault(
        "18 adaptive beta moves away from its target",
        "objectives/ppo.py",
        "return beta * (1 + error * sequences / horizon)",
        "return beta * (1 - error * sequences / horizon)",
        "unit/objectives/test_ppo.py::test_beta_moves_toward_the_target_and_never_faster_than_a_fifth",
    ),
    Fault(
        "19 running scaling knows the last batch alone",
        "rl/rewards.py",
        "        self.count = total\n",
        "        self.count, self.squares = n, variance * n\n",
        f"{OPTIONS}::test_running_spread_is_that_of_all_scores",
    ),
    Fault(
        "20 each rank whitens by itself",
        "rl/rewards.py",
        "return collectives.sum_tensor(ppo.moments(x, mask, about).to(device.torch_device)).cpu()",
        "return ppo.moments(x, mask, about)",
        "dist/test_gloo.py::test_whitening_spans_the_ranks",
    ),
    Fault(
        "20 whitened advantages get their mean back",
        "train/ppo.py",
        "advantages = whitened(advantages, mask, device, shift_mean=True)",
        "advantages = whitened(advantages, mask, device, shift_mean=False)",
        f"{PPO}::test_whitening",
    ),
    Fault(
        "21 GAE reads what lies in a hole of the mask",
        "objectives/ppo.py",
        "next_value = torch.where(here, values[:, t], next_value)",
        "next_value = values[:, t]",
        "unit/objectives/test_ppo.py::test_gae_steps_over_holes_and_ignores_what_is_in_them",
    ),
    Fault(
        "21 returns are taken after whitening",
        "train/ppo.py",
        "advantages, values, bootstrap, returns)",
        "advantages, values, bootstrap, advantages + values)",
        f"{PPO}::test_the_end_is_terminal",
    ),
    Fault(
        "22 the ratio is not 1 at first: another temperature in the update",
        "train/ppo.py",
        'shared = actor(micro.packed, "logprobs", s.temperature)',
        'shared = actor(micro.packed, "logprobs", 1.0)',
        f"{PPO}::test_first_mini_batch",
    ),
    Fault(
        "23 every epoch has the same order",
        "rl/minibatches.py",
        'generator_for(key[0], "mini-batches", key[1], epoch)',
        'generator_for(key[0], "mini-batches", key[1], 0)',
        f"{PPO}::test_epochs_read_every_row_once_in_fresh_order",
    ),
    Fault(
        "24 the actor moves while the critic warms up",
        "train/ppo.py",
        "actor_learns = not warming",
        "actor_learns = True",
        f"{PPO}::test_critic_warms_up_alone",
    ),
    Fault(
        "25 the value's coefficient has no effect on a shared trunk",
        "train/ppo.py",
        "tokens, s.value_clip_range, s.value_coef)",
        "tokens, s.value_clip_range, 0.1)",
        f"{OPTIONS}::test_shared_trunk_learns_both_in_one_step",
    ),
    Fault(
        "26 gradients are not clipped",
        "distributed/sharding.py",
        "clip_grad_norm_(trained, max_norm or math.inf)",
        "clip_grad_norm_(trained, math.inf)",
        "unit/training/test_step.py::test_clipping",
    ),
    Fault(
        "27 the learning rate does not fall",
        "training/optimizer.py",
        'return left if schedule == "linear" else 1.0',
        "return 1.0",
        "unit/training/test_optimizer.py::test_schedules",
    ),
    Fault(
        "28 an update goes on however far it went",
        "train/ppo.py",
        'actor_learns = not s.early_stop_kl or stats.terms["approx_kl"] <= s.early_stop_kl',
        "actor_learns = True",
        f"{OPTIONS}::test_an_update_stops_when_the_policy_has_moved",
    ),
    Fault(
        "29 the entropy bonus has the wrong sign",
        "rl/minibatches.py",
        '"tokens", -coef)',
        '"tokens", coef)',
        f"{PPO}::test_entropy_bonus_has_an_effect",
    ),
    Fault(
        "30 text beside PPO is not learned",
        "train/ppo.py",
        '"ptx_tokens", micro.data.coefficient)',
        '"ptx_tokens", 0.0)',
        f"{OPTIONS}::test_text_beside_ppo_holds_the_language_model",
    ),
    Fault(
        "31 the moving average follows with the wrong weight",
        "rl/models.py",
        "lerp_(local(tensor), 1 - self.decay)",
        "lerp_(local(tensor), self.decay)",
        f"{OPTIONS}::test_moving_average_follows_the_actor",
    ),
    Fault(
        "32 the critic is not in the checkpoint",
        "rl/models.py",
        '{"critic": Weights(own_head)}',
        "{}",
        f"{OPTIONS}::test_a_checkpoint_of_a_shared_trunk_has_the_head_alone_beside_the_actor",
    ),
    Fault(
        "33 the largest ratio is that of the last micro-batch",
        "training/step.py",
        "torch.maximum(t.sum, largest.get(t.name, t.sum)).detach()",
        "t.sum.detach()",
        f"{OPTIONS}::test_ratio_max_is_the_largest_of_all_micro_batches",
    ),
    Fault(
        "34 the record of a token has its neighbour's value",
        "rl/samples.py",
        "[*arrays, batch.values, batch.returns]",
        "[*arrays, batch.values.roll(1, 1), batch.returns]",
        "unit/train/test_ppo_stage.py::test_every_number_of_a_sampled_token_is_kept",
    ),
    Fault(
        "35 the greedy reply beside PPO's is PPO's own",
        "rl/samples.py",
        "self._greedy(self.models.actor), self._greedy(self.models.reference)",
        "self._greedy(self.models.actor), self._greedy(self.models.actor)",
        "unit/train/test_ppo_stage.py::test_greedy_replies_stand_beside_the_sft_models",
    ),
    Fault(
        "36 a judge that falls is not heard",
        "rl/monitor.py",
        "fell = rises and _z_score(self.windows[name]) < -1",
        "fell = False",
        "unit/rl/test_monitor.py::test_a_judge_that_falls_while_the_score_rises",
    ),
    Fault(
        "values are read after their tokens",
        "model/transformer.py",
        'at += [_labelled(packed)] if want in ("values", "both") else []',
        'at += [_labelled(packed) + 1] if want in ("values", "both") else []',
        f"{PPO}::test_values_stand_before_their_tokens",
    ),
    Fault(
        "NaN in the padding leaks: masks multiply",
        "objectives/ppo.py",
        "return torch.where(mask, values, torch.zeros((), dtype=values.dtype, device=values.device))",
        "return values * mask",
        "unit/objectives/test_ppo.py::test_masked_garbage_reaches_no_result",
    ),
    Fault(
        "micro-batches weigh the same, whatever their size",
        "training/step.py",
        "_backward(_loss(parts, totals), device)",
        "_backward([part / len(micros) for part in _loss(parts, micro.counts)], device)",
        f"{PPO}::test_micro_batch_size_changes_rounding_only",
    ),
    Fault(
        "a token meets another's advantage",
        "rl/minibatches.py",
        "{name: x[mask].to(",
        '{name: (x[mask].flip(0) if name == "advantages" else x[mask]).to(',
        f"{PPO}::test_micro_batches_carry_their_own_numbers",
    ),
    Fault(
        "the end of a reply is bootstrapped",
        "train/ppo.py",
        "bootstrap = torch.where(rollout.finished_B, 0, bootstrap) if s.bootstrap_truncated"
        " else torch.zeros_like(scores)",
        "pass",
        f"{PPO}::test_the_end_is_terminal",
    ),
    Fault(
        "the end token is no label",
        "rl/rollout.py",
        "np.arange(len(ids)) >= len(sample.prompt_ids)",
        "(np.arange(len(ids)) >= len(sample.prompt_ids)) & ~np.isin(ids, actor.config.eos_ids)",
        f"{PPO}::test_layout_of_a_rollout",
    ),
    Fault(
        "the reference learns",
        "train/ppo.py",
        "ref_logprobs = read_logprobs(models.reference, *inputs, s.temperature)",
        "ref_logprobs = read_logprobs(models.actor, *inputs, s.temperature)",
        f"{PPO}::test_kl_to_the_reference_starts_at_exactly_nothing",
    ),
    Fault(
        "warm-up bootstraps on values that know nothing",
        "train/ppo.py",
        "lam = 1.0 if step < s.critic_warmup else s.gae_lambda",
        "lam = s.lam",
        f"{OPTIONS}::test_warm_up_learns_whole_returns",
    ),
    Fault(
        "the dual clip bounds nothing",
        "objectives/ppo.py",
        "losses = torch.where(capped, -dual_clip * advantages_N, losses)",
        "losses = torch.where(capped, losses, losses)",
        f"{OPTIONS}::test_dual_clip_bounds_the_loss_of_a_bad_token",
    ),
    Fault(
        "a weight of a reward source has no effect",
        "reward/sources.py",
        "[one.weight * _cut(x, one.clip) for x in source_scores[name]]",
        "[_cut(x, one.clip) for x in source_scores[name]]",
        f"{OPTIONS}::test_a_sum_of_sources_is_weighed_and_told_in_parts",
    ),
    Fault(
        "an endpoint may send its samples elsewhere",
        "reward/functions.py",
        "build_opener(_Stay)",
        "build_opener()",
        "unit/reward/test_endpoint.py::test_what_is_no_answer",
    ),
    Fault(
        "an endpoint's moment of trouble ends the stage",
        "reward/functions.py",
        "for wait in (*_WAITS, None):",
        "for wait in (None,):",
        "unit/reward/test_endpoint.py::test_a_moments_trouble_is_waited_out",
    ),
    Fault(
        "two sources of a reward share a name, and one is lost",
        "reward/sources.py",
        "next(name for name in tries if name not in taken)",
        "plain",
        f"{OPTIONS}::test_no_two_sources_of_a_reward_share_a_name",
    ),
    Fault(
        "adapters do not begin as the base",
        "model/lora.py",
        "torch.zeros(linear.out_features, rank",
        "torch.ones(linear.out_features, rank",
        "unit/model/test_lora.py::test_begins_as_the_base_exactly_and_owns_nothing_of_it",
    ),
    Fault(
        "merging forgets the adapters",
        "model/lora.py",
        "(linears[name].whole() if name in linears",
        "(linears[name].weight.detach() if name in linears",
        "unit/model/test_lora.py::test_merged_is_the_same_function_and_leaves_the_base_alone",
    ),
    Fault(
        "other libraries read another scale",
        "model/lora.py",
        '"lora_alpha": scale * rank',
        '"lora_alpha": scale',
        "parity/test_peft.py::test_an_actors_adapter",
    ),
    Fault(
        "llama.cpp gets q and k as Hugging Face has them",
        "export/gguf.py",
        ".transpose(1, 2).reshape(tensor.shape)",
        ".reshape(tensor.shape)",
        "unit/export/test_export.py::test_every_tensor",
    ),
    Fault(
        "norms are quantised",
        "export/gguf.py",
        "if tensor.dim() == 1:",
        "if tensor.dim() == 0:",
        "unit/export/test_export.py::test_smaller_types",
    ),
    Fault(
        "any tokenizer is taken for one that llama.cpp knows",
        "export/vocabulary.py",
        'bool(model.get("ignore_merges"))',
        "False",
        "unit/export/test_export.py::test_how_it_splits_decides_the_name",
    ),
    Fault(
        "an export in another type has the key of the first",
        "export/folder.py",
        " {sorted(meta.items())}",
        "",
        "unit/export/test_export.py::test_keys_of_types_differ",
    ),
    Fault(
        "Ollama's template forgets the default system prompt",
        "export/ollama.py",
        "if form.system else",
        "if form.trims else",
        "unit/export/test_export.py::test_the_modelfiles_template_writes_the_prompt",
    ),
    Fault(
        "PEFT reads a key that it does not know",
        "model/lora.py",
        '"r": rank,',
        '"r": rank, "base_sha256": "",',
        "parity/test_peft.py::test_an_actors_adapter",
    ),
    Fault(
        "adapters on another base are taken",
        "training/adapters.py",
        "!= weights_digest(base_folder)",
        '!= notes["base_sha256"]',
        "unit/train/test_ppo_stage.py::test_adapters_on_another_base_are_refused",
    ),
    Fault(
        "adapters are left out where a folder of them is read",
        "model/huggingface.py",
        "        absorb(model)\n",
        "",
        "unit/train/test_kept_adapters.py::test_the_numbers_are_those_of_merged_weights",
    ),
    Fault(
        "a changed base is taken",
        "model/inspect.py",
        "!= stack.sha256:",
        "is None:",
        "unit/train/test_kept_adapters.py::test_a_base_that_is_gone_or_changed",
    ),
    Fault(
        "the base is hashed again for each model",
        "storage.py",
        "    return _digest(path, status",
        "    return _digest.__wrapped__(path, status",
        "unit/train/test_kept_adapters.py::test_the_base_is_read_once_for_its_sha256",
    ),
    Fault(
        "adapters of another scale are laid beside the first",
        "training/adapters.py",
        "[stack.scale, stack.config",
        "[ours[0], stack.config",
        "unit/train/test_kept_adapters.py::test_adapters_on_adapters_of_another_run",
    ),
    Fault(
        "the reward model's bias is lost on its base",
        "training/adapters.py",
        'new_tensor(notes["reward_bias"])',
        "new_tensor(0.0)",
        "unit/train/test_ppo_stage.py::test_adapters_score_as_the_merged_reward_model_does",
    ),
    Fault(
        "a stop forgets beta",
        "train/ppo.py",
        '        self.kl.beta = saved["beta"]\n',
        "",
        "unit/train/test_ppo_stage.py::test_goes_on_exactly",
    ),
    Fault(
        "a stop forgets how scores spread",
        "train/ppo.py",
        '        self.running_std.restore(saved["scores"])\n',
        "",
        "unit/train/test_ppo_stage.py::test_goes_on_exactly",
    ),
    Fault(
        "a stop forgets the moving average",
        "rl/models.py",
        '| ({"average": self.ema} if self.ema else {})',
        "",
        "unit/train/test_ppo_stage.py::test_goes_on_exactly",
    ),
    Fault(
        "a stop forgets the alarms",
        "rl/monitor.py",
        'self.start, self.negative_ev_streak, self.reported = saved["start"], saved["failing"], saved["told"]',
        "pass",
        "unit/rl/test_monitor.py::test_the_start_survives_a_stop",
    ),
    Fault(
        "a judge that falls with the score is an alarm",
        "rl/monitor.py",
        'rises = _z_score(self.windows["score"]) > 0',
        "rises = True",
        "unit/rl/test_monitor.py::test_a_judge_that_falls_while_the_score_rises",
    ),
    Fault(
        "alarms are deaf",
        "rl/monitor.py",
        "level = sum(sign * value >= sign * limit for limit in limits if limit or rule.above)",
        "level = 0",
        "learn/test_alarms.py::test_a_planted_hack_is_told_within_ten_steps",
    ),
    Fault(
        "explain works a cut reply out as if it had ended",
        "rl/explain.py",
        'if s.bootstrap_truncated and not record["finished"] else None',
        "if False else None",
        "unit/rl/test_explain.py::test_a_cut_reply_goes_on_in_the_critics_value",
    ),
    Fault(
        "explain forgets the warm-up's lambda",
        "rl/explain.py",
        "1.0 if warming else s.gae_lambda",
        "s.lam",
        "unit/rl/test_explain.py::test_the_arithmetic_adds_up",
    ),
    Fault(
        "the text beside PPO is not read ahead",
        "datacheck/reading.py",
        'return {"ptx": "ppo"}.get(table, table)',
        "return table",
        "unit/datacheck/test_check.py::test_reading_ahead_finds_a_bad_line_of_the_text_beside_ppo",
    ),
    Fault(
        "beta moves while the actor is frozen",
        "train/ppo.py",
        "if step >= s.critic_warmup:",
        "if True:",
        "unit/train/test_ppo_stage.py::test_beta_waits_for_the_actor",
    ),
    Fault(
        "a critic beside the average has the average's trunk",
        "rl/models.py",
        "v.detach().clone() for",
        "v.detach() for",
        "unit/train/test_ppo_stage.py::test_what_is_kept_beside_the_result_are_whole_models",
    ),
    Fault(
        "a reward model among others is cut twice",
        "rl/rewards.py",
        "s.clips_sum and s.reward_clip",
        "s.reward_clip",
        "unit/train/test_ppo_stage.py::test_the_reward_model_among_others_is_cut_and_then_weighed",
    ),
    Fault(
        "GRPO: the upper clip is that of PPO",
        "train/grpo.py",
        "s.clip_high or s.clip_range",
        "s.clip_range",
        "conformance/test_grpo.py::test_clipping_goes_further_upwards_where_asked",
    ),
    Fault(
        "GRPO: KL in the reward has the wrong sign",
        "train/grpo.py",
        "token_rewards(s, scores, logprobs, ref_logprobs,",
        "token_rewards(s, scores, ref_logprobs, logprobs,",
        "conformance/test_grpo.py::test_kl_in_the_reward_is_the_whole_responses",
    ),
    Fault(
        "GRPO: KL in the reward is a mean over tokens",
        "train/grpo.py",
        "group_advantages(rewards.sum(1),",
        "group_advantages((rewards.sum(1) - scores) / rollout.mask_BT.sum(1) + scores,",
        "conformance/test_grpo.py::test_kl_in_the_reward_is_the_whole_responses",
    ),
    Fault(
        "GRPO: k1 is taken as a loss",
        "objectives/grpo.py",
        'if kind == "k1":',
        'if kind == "k0":',
        "unit/objectives/test_grpo.py::test_k1_as_a_loss_is_refused_and_this_is_why",
    ),
    Fault(
        "GRPO: dropout in the update",
        "train/grpo.py",
        "factor, updates = lr_factor",
        "models.actor.train()\n    factor, updates = lr_factor",
        "conformance/test_grpo.py::test_dropout_stands_neither_between_actor_and_reference_nor_in_the_update",
    ),
    Fault(
        "GRPO: with adapters the reference is the actor",
        "rl/models.py",
        "reference=reference,",
        "reference=actor,",
        "unit/train/test_grpo_stage.py::test_adapters_leave_the_reference_what_the_sft_model_is",
    ),
    Fault(
        "judges changed at a stop share one window",
        "rl/monitor.py",
        'self.windows.keys() != {"score", *judges}',
        "not self.windows",
        "unit/rl/test_monitor.py::test_other_judges_after_a_stop_are_watched_anew",
    ),
    Fault(
        "an adaptive beta may reach nothing",
        "pipeline/validation.py",
        ">= 5 * ppo.kl_horizon",
        ">= 500 * ppo.kl_horizon",
        "unit/pipeline/test_recipe.py::test_mistakes_of_a_file",
    ),
    Fault(
        "an ensemble pays by its first member on adapters",
        "pipeline/validation.py",
        "(read and reward.ensemble_size > 1)",
        "False",
        "unit/pipeline/test_recipe.py::test_mistakes_of_a_file",
    ),
    Fault(
        "a gate that failed does not weigh on the verdict",
        "report/verdict.py",
        "reasons = [*faults, *(",
        "reasons = [*(",
        "unit/report/test_verdict.py::test_each_case",
    ),
    Fault(
        "each of several judges decides at its own level",
        "report/verdict.py",
        "1 - LEVEL / judges / 2",
        "1 - LEVEL / 2",
        "unit/report/test_verdict.py::test_each_case",
    ),
    Fault(
        "best of N takes what is no text",
        "inference/completions.py",
        "(samples[i].valid_utf8, scores[i])",
        "scores[i]",
        "conformance/test_scores.py::test_best_of_n_prefers_what_can_be_written",
    ),
    Fault(
        "dropout follows the place in the micro-batch",
        "model/dropout.py",
        "_mixed(keys_T + seed_for(",
        "_mixed(torch.arange(len(keys_T)) + seed_for(",
        "unit/model/test_dropout.py::test_neighbours_order_padding_and_shared_prefixes_change_no_mask",
    ),
    Fault(
        "an answer labelled false is learned",
        "data/record_formats.py",
        "or (label and str(fields[label]).lower() in _FALSE)",
        "",
        "unit/data/test_records.py::test_a_false_label_is_no_good_answer",
    ),
    Fault(
        "a model in training is sampled with the weights it had",
        "inference/fused_model.py",
        " and all(map(torch.equal, self._last[1], marks))",
        "",
        "unit/inference/test_policy.py::test_a_changed_model_answers_as_its_fresh_copy",
    ),
    Fault(
        "every batch has a size of its own",
        "kernels/onednn.py",
        'return rows + -rows % _step(rows - 1) if device.type == "cpu" else rows',
        "return rows",
        "unit/kernels/test_onednn.py::test_few_sizes_and_little_padding",
    ),
    Fault(
        "rank: an item that someone has open is given to another",
        "server/ranking.py",
        "self._final(item_id) + busy <",
        "self._final(item_id) <",
        "unit/server/test_ranking.py::test_no_two_people_have_the_same_open_item_unless_overlap_wants_it",
    ),
    Fault(
        "rank: everyone sees the answers in one order",
        "server/ranking.py",
        ".shuffle(answers)",
        ".random()",
        "unit/server/test_ranking.py::test_the_order_is_drawn_per_person_and_item_and_stored",
    ),
    Fault(
        "rank: what was half written stays in the file",
        "journal.py",
        "with suppress(UserError):  # else the next commit cuts what is left of this one\n"
        "                self.truncate(before)",
        "self._failed = False",
        "unit/server/test_ranking.py::test_a_disk_that_refuses_stores_nothing_and_the_retry_does",
    ),
    Fault(
        "rank: another person's token is taken",
        "server/rank_app.py",
        'or not people.matches(request.headers.get("x-csrf-token", ""), name, "csrf")',
        "",
        "unit/server/test_rank_app.py::test_l005_the_token_must_be_ones_own",
    ),
    Fault(
        "server: no role chunk",
        "server/generation.py",
        "choices += form.begin(index) if index not in begun else ()",
        "choices += ()",
        f"{CHAT}::test_the_order_of_a_stream",
    ),
    Fault(
        "server: an answer that was cut says stop",
        "server/generation.py",
        'return "stop" if part.finished else "length"',
        'return "stop"',
        f"{CHAT}::test_the_order_of_a_stream",
    ),
    Fault(
        "server: an error in a stream looks like its end",
        "server/generation.py",
        "yield _event(error.body)",
        'yield "data: [DONE]\\n\\n"',
        f"{WORKER}::test_an_error_in_a_stream_ends_it",
    ),
    Fault(
        "server: a field that nobody knows is ignored",
        "server/schema.py",
        'extra="forbid"',
        'extra="ignore"',
        f"{FIELDS}::test_refused_by_name",
    ),
    Fault(
        "server: a refusal names no field",
        "server/schema.py",
        'f"{name}: {what}", name,',
        'f"{name}: {what}", None,',
        f"{FIELDS}::test_refused_by_name",
    ),
    Fault(
        "server: each token is decoded by itself",
        "server/generation.py",
        '"".join(one.text for one in held[index])',
        '"".join(form.tokenizer.decode([token]) for one in held[index] for token in one.tokens)',
        f"{CHAT}::test_half_characters_never_leave",
    ),
    Fault(
        "server: the chosen token's float is another in the top",
        "server/completions.py",
        "named = {self.token(number): logprob}",
        "named = {self.token(number): logprob - 1e-7}",
        f"{TEXT}::test_what_lm_eval_reads",
    ),
    Fault(
        "server: an end token is not shown",
        "server/generation.py",
        "yield from zip(part.tokens, part.logprobs, part.top or ((),) * len(part.tokens), strict=True)",
        'yield from zip(part.tokens[: None if part.reason != "end" else -1], part.logprobs, [()] * 99)',
        f"{TEXT}::test_what_lm_eval_reads",
    ),
    Fault(
        "server: the first token has a likelihood",
        "server/completions.py",
        "[(first, None, ())",
        "[(first, 0.0, ())",
        f"{TEXT}::test_what_lm_eval_reads",
    ),
    Fault(
        "server: likelihoods stand one place late",
        "inference/likelihood.py",
        "ids_T[1:].split(ROWS)",
        "ids_T[:-1].split(ROWS)",
        f"{TEXT}::test_what_lm_eval_reads",
    ),
    Fault(
        "server: all answers of a prompt have one index",
        "server/generation.py",
        "index, count = part.prompt * body.n + part.sample",
        "index, count = part.prompt * body.n",
        f"{CHAT}::test_several_answers_have_their_own_index",
    ),
    Fault(
        "server: one seed for all requests",
        "server/generation.py",
        "keys = tuple((seed,",
        "keys = tuple((0,",
        f"{CHAT}::test_a_seed_gives_the_same_text_under_load",
    ),
    Fault(
        "server: an empty answer is null",
        "server/chat.py",
        '{"role": "assistant", "content": text}}',
        '{"role": "assistant", "content": text or None}}',
        f"{CHAT}::test_content_is_a_text_even_if_empty",
    ),
    Fault(
        "server: who leaves is answered to the end",
        "server/worker.py",
        "if job.left:\n",
        "if False:\n",
        f"{WORKER}::test_a_client_that_leaves_frees_its_rows",
    ),
    Fault(
        "server: the queue has no end",
        "server/worker.py",
        "if len(self._waiting) >= self.queue:",
        "if self.queue < 0:",
        f"{WORKER}::test_a_full_queue_refuses_at_once",
    ),
    Fault(
        "server: an idle engine is asked again and again",
        "inference/engine_process.py",
        "idle = not (self.waiting or self.growing)",
        "idle = False",
        f"{WORKER}::test_an_idle_engine_sleeps",
    ),
    Fault(
        "server: a broken engine is used again",
        "inference/engine_process.py",
        "            self.engine = None\n",
        "            pass\n",
        f"{WORKER}::test_an_error_in_a_stream_ends_it",
    ),
    Fault(
        "server: a dead engine's requests wait for ever",
        "server/worker.py",
        'self._fail(self._open, Refused(503, "the model failed"))',
        "pass",
        f"{WORKER}::test_a_killed_process_ends_what_it_did_and_is_replaced",
    ),
    Fault(
        "server: a dead engine stays dead until someone asks",
        "server/worker.py",
        "            if not self._loaded:\n",
        "            if True:\n",
        f"{WORKER}::test_a_killed_process_ends_what_it_did_and_is_replaced",
    ),
    Fault(
        "server: the engine stops with the first signal",
        "inference/engine_process.py",
        "signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))",
        "signal.pthread_sigmask(signal.SIG_BLOCK, ())",
        "cli/test_serve.py::test_it_serves_and_ends_in_order",
    ),
    Fault(
        "server: an answer that goes on begins after its end token",
        "text/chat_template.py",
        "            pieces.pop()  # its end token",
        "            pass",
        f"{CHAT}::test_an_answer_goes_on",
    ),
    Fault(
        "server: control tokens in a prompt's text are obeyed",
        "server/completions.py",
        "texts.append(model.tokenizer.encode(prompt))",
        "texts.append(model.tokenizer.encode_raw(prompt))",
        f"{TEXT}::test_forms_of_prompts",
    ),
)


def planted(fault: Fault) -> tuple[bool, str]:
    """Whether the test fails with the fault in a copy of the source; and its last line."""
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place, "src")
        shutil.copytree(ROOT / "src", copy, ignore=shutil.ignore_patterns("__pycache__"))
        path = copy / "tetrad" / fault.file
        path.write_text(path.read_text().replace(fault.old, fault.new, 1))
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-x",
            "-p",
            "no:cacheprovider",
            "-o",
            f"pythonpath={copy} tests",
        ]
        command.append(f"tests/{fault.test}")
        environment = {**os.environ, "PYTHONPATH": str(copy), "PYTHONDONTWRITEBYTECODE": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        lines = [line for line in done.stdout.splitlines() if line.startswith("E  ")] or done.stdout.splitlines()[-1:]
        return done.returncode == 1, lines[0].strip() if lines else ""


def main() -> int:
    wanted = [int(word) for word in sys.argv[1:]] or range(len(FAULTS))
    missed = 0
    for number in wanted:
        fault = FAULTS[number]
        failed, why = planted(fault)
        missed += not failed
        print(
            f"| {fault.item} | {fault.test.partition('::')[2]} | {'fails' if failed else 'PASSES'} | {why[:90]} |",
            flush=True,
        )
    print(f"{len(wanted) - missed} of {len(wanted)} faults were found")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
