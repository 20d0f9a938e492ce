"""Arguments of the commands that use a model: generate, chat, score, export, doctor."""

from dataclasses import replace
from typing import Annotated, ClassVar, Literal, TypeVar

from annotated_types import Ge, Le

from tetrad.errors import UserError
from tetrad.settings.base import ESCAPED, Count, File, NotNegative, Positive, Seed, Share, TemplateName, Whole, settings
from tetrad.settings.common import Sampling

T = TypeVar("T", bound="Sample")


@settings
class Sample(Sampling):
    """How responses are sampled. A small model is best at the likelier half of what it could say."""

    GROUPS: ClassVar = {
        "sampling": "top_k min_p repetition_penalty presence_penalty frequency_penalty max_num_seqs",
    }

    temperature: NotNegative = 0.7
    """Logits are divided by it; 0 is greedy, 1 samples as PPO and evaluate do."""
    top_p: Share = 0.9
    """Sample among the most likely tokens that reach this probability together; 1 is off."""
    greedy: bool = False
    """Always the most likely token (temperature 0)."""
    stop: Annotated[tuple[str, ...], ESCAPED] = ()
    """Texts that end a response before them, for example "\\n" (a line end; a backslash itself is \\\\)."""
    seed: Seed = 0
    """Seed of the random numbers: the same seed gives the same responses."""
    template: TemplateName = ""
    """How a prompt becomes text, where the model's folder doesn't say."""


@settings
class Generate(Sample):
    """Answer one prompt or a file of prompts."""

    model: str = ""
    """A stage of a run ("runs/NAME/ppo"), a Hugging Face folder, or a model of the hub ("org/name")."""
    instruction: str = ""
    """The prompt's Instruction."""
    input: str = ""
    """The prompt's Input, beside `instruction`."""
    prompts: File = ""
    """A file of prompts, instead of `instruction`."""
    rename: tuple[str, ...] = ()
    """Other names of the file's fields, as question=Instruction."""
    out: File = ""
    """Write the answers to this jsonl file; without it they are printed."""
    best_of: Count = 1
    """Responses per prompt, of which the one with the highest reward is kept; needs `reward`."""
    reward: str = ""
    """The reward model's folder, for `best_of`."""
    top_logprobs: Whole = 0
    """Write each token's log-probability, and those of this many most likely tokens in its place; 0 writes none."""


@settings
class Chat(Sample):
    """Talk to a model in the terminal."""

    model: str = ""
    """A stage of a run ("runs/NAME/ppo"), a Hugging Face folder, or a model of the hub ("org/name")."""
    system: str = ""
    """The system message (the Instruction, for a model of the `instruction` template)."""
    reward: str = ""
    """A reward model's folder: `/score` shows its score of the last response."""


@settings
class Serve:
    """Serve models and a reward model over HTTP."""

    reward: str = ""
    """A reward model's folder: scores answers, and shows its score beside each answer of the chat page."""
    host: str = "127.0.0.1"
    """The address to listen at; any but a loopback one needs a key."""
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    """The port; 0 takes a free one."""
    api_key_file: File = ""
    """A file, readable by its owner only (mode 0600), with the key that requests must have; or set TETRAD_API_KEY."""
    max_body_mib: Annotated[int, Ge(1), Le(256)] = 1
    """The largest request, in MiB. A PPO batch that is scored over HTTP may need more."""
    max_num_seqs: Count = 32
    """Most responses that grow together, for each model."""
    max_model_len: Whole = 0
    """Most tokens of a prompt with its response; 0 is the model's limit. There must be memory for them."""
    template: TemplateName = ""
    """How a prompt becomes text, where the model's folder doesn't say."""


@settings
class Rank(Sample):
    """A page on which people rank answers, and the file that a reward model learns from."""

    prompts: File = ""
    """A file of prompts; the answers of a record that has `choices` are ranked as they are, the others are sampled."""
    rename: tuple[str, ...] = ()
    """Other names of the file's fields, as question=Instruction."""
    out: File = ""
    """The jsonl file of rankings, as the reward stage reads it. The same command goes on with it."""
    annotators: File = ""
    """A file with a name a line: each gets a personal link; without it everyone enters a name."""
    answers: Annotated[int, Ge(2), Le(26)] = 4
    """Answers to each prompt, sampled from the models in turn."""
    overlap: Share = 0.0
    """Share of the prompts that two people rank, which shows how far they agree."""
    reward: str = ""
    """A reward model's folder: the prompts whose order it is least certain of come first."""
    scale: tuple[float, float] | tuple[()] = ()
    """Also ask for scores on this scale: the lowest and the highest, as reward.score_scale."""
    controls: File = ""
    """A file of ranked records whose order is known: 5 % of what is asked, unmarked, and kept out of `out`."""
    minutes: Positive = 15.0
    """How long a prompt that someone has open is kept for them."""
    min_seconds: NotNegative = 0.0
    """Rankings given faster than this are kept out of `out`, and the annotator is told."""
    host: str = "127.0.0.1"
    """The address to listen at; any but a loopback one needs `annotators`."""
    port: Annotated[int, Ge(0), Le(65535)] = 8000
    """The port; 0 takes a free one."""


@settings
class ScoreFile:
    """Score answers with a reward model."""

    model: str = ""
    """The reward model's folder ("runs/NAME/reward")."""
    data: File = ""
    """A file with a prompt and an answer per record: `input` and `output`, or Instruction, Input and Output, or
    messages; or what `generate` wrote, whose `response` is scored; or pairs, ranked lists and benchmarks of them."""
    rename: tuple[str, ...] = ()
    """Other names of the file's fields, as question=Instruction answer=Output."""
    out: File = ""
    """Write the scores to this jsonl file; without it they are printed, unless the file has judgements."""
    json: File = ""
    """Write the agreement with the file's judgements to this file of JSON."""
    by: str = "subset"
    """The field whose values are subsets: the agreement is reported for each."""
    pair_gap: NotNegative = 0.0
    """Pairs of rated answers whose ratings are closer than this are left out."""
    template: TemplateName = ""
    """How a prompt becomes text, where the model's folder doesn't say."""


@settings
class Check:
    """Reads everything, trains nothing. Settings of a recipe may be given too."""

    tokenizer: str = ""
    """For data files: a folder with the tokenizer that counts their tokens."""
    template: TemplateName = ""
    """For data files: how a record becomes text."""
    max_tokens: Whole = 0
    """For data files: the longest record; 0 is no limit."""
    kind: Literal["", "documents", "conversations", "preferences", "prompts"] = ""
    """For data files: what the records are, if their fields don't show it."""
    rename: tuple[str, ...] = ()
    """For data files: other names of fields, as question=Instruction answer=Output."""
    measure: bool = False
    """Of a recipe: time a few steps of each stage with a model of its shape, instead of estimating the time."""
    json: str = ""
    """Write the whole report to this file of JSON."""
    html: str = ""
    """Write the report with plots to this page; it needs no network."""
    quarantine: str = ""
    """Write every refused row with its reason to this jsonl file."""


@settings
class Init:
    """Write a short recipe for data files."""

    from_: str = ""
    """A model to start from (a Hugging Face folder, or a stage of a run); without one a new model is trained."""
    out: File = "recipe.toml"
    """The recipe to write."""
    split: Share = 0.1
    """Share of the prompts of SFT and preference files that is held out where no file is named for that; 0: none."""
    rename: tuple[str, ...] = ()
    """Other names of fields, as question=Instruction answer=Output; usual ones are recognised."""


@settings
class Explain:
    """One step of PPO with its real numbers, token by token; or what a metric means."""

    model: str = ""
    """A run or its PPO stage ("runs/NAME/ppo"); or the name of a metric."""
    step: int = -1
    """The step, as in metrics.jsonl; the last recorded one by default."""
    responses: Count = 1
    """How many to show (three are recorded)."""


@settings
class Page:
    """One page of a run, or of several side by side: it opens with the network off."""

    out: File = ""
    """The page's file; by default report.html in the run's folder, of several runs report-NAME.html in the first's."""


@settings
class Export:
    """A model for other programs: transformers, PEFT, llama.cpp and Ollama."""

    model: str = ""
    """A stage of a run ("runs/NAME/ppo") or a Hugging Face folder."""
    to: File = ""
    """The new folder, for transformers or, with `adapter_only`, for PEFT."""
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """The type of the weights in the folder `to`."""
    adapter_only: bool = False
    """Only the adapters of a stage that was trained with adapters."""
    base: str = ""
    """With `adapter_only`: where others find the model that the adapters were trained on, a name of the hub or a
    folder."""
    gguf: File = ""
    """The new GGUF file. A Modelfile for Ollama is written beside it."""
    type: Literal["f32", "f16", "q8_0"] = "f16"
    """The type of the matrices in the GGUF file; norms and biases stay float32."""
    template: TemplateName = ""
    """How a prompt becomes text, where the model's folder doesn't say."""


@settings
class Doctor:
    """Versions, device and memory; with `vectors`, the numeric self-test."""

    vectors: str = ""
    """A file of test vectors: every objective is computed and compared, in float64 and float32."""


def agreed_export(values: Export, given: set[str]) -> Export:
    """The settings of `export`, if they go together. given: what the user set. Raises as `agreed`."""
    if bool(values.to) == bool(values.gguf):
        what = "give either --to FOLDER or --gguf FILE" + (", not both" if values.to else "")
        raise UserError("E-CONF-CONFLICT" if values.to else "E-CONF-MISSING", what, where="export")
    for name, needs in (("dtype", "to"), ("adapter_only", "to"), ("type", "gguf"), ("base", "adapter_only")):
        if name in given and not getattr(values, needs):
            flags = [f"--{flag.replace('_', '-')}" for flag in (name, needs)]
            raise UserError(
                "E-CONF-CONFLICT", f"{flags[0]} goes with {flags[1]}", where="export", hint=f"add {flags[1]}"
            )
    return values


def agreed(values: T, given: set[str]) -> T:
    """The settings with `greedy` put into effect. given: what the user set.

    Raises UserError E-CONF-CONFLICT or E-CONF-MISSING for settings that don't go together.
    """
    if isinstance(values, Generate):
        if bool(values.prompts) == bool(values.instruction):
            what = "give either --instruction or --prompts" + (", not both" if values.prompts else "")
            raise UserError("E-CONF-CONFLICT" if values.prompts else "E-CONF-MISSING", what, where="generate")
        if values.input and not values.instruction:
            raise _conflict("--input", "--prompts", "put the Input into the file's records")
        if (values.best_of > 1) != bool(values.reward):
            hint = "add --reward FOLDER" if values.best_of > 1 else "add --best-of 16"
            raise UserError("E-CONF-MISSING", "--best-of and --reward need each other", where="generate", hint=hint)
        if values.greedy and values.best_of > 1:
            raise _conflict("--greedy", "--best-of", "all greedy responses are the same")
    if values.greedy and "temperature" in given:
        raise _conflict("--greedy", "--temperature", "--greedy is --temperature 0")
    return replace(values, temperature=0.0) if values.greedy else values


def _conflict(one: str, other: str, hint: str) -> UserError:
    return UserError("E-CONF-CONFLICT", f"{one} and {other} exclude each other", where=one, hint=hint)
