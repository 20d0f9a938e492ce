"""A recipe: the settings of all stages, joined. Reading and writing the file is `tetrad.pipeline.recipe`'s."""

from tetrad.settings.alarms import Alarms
from tetrad.settings.base import Seed, settings
from tetrad.settings.common import Data, Optim, Run, Sampling
from tetrad.settings.evaluate import Evaluate
from tetrad.settings.gate import Gate
from tetrad.settings.lora import Lora
from tetrad.settings.model import Model
from tetrad.settings.ppo import Ppo
from tetrad.settings.pretrain import Pretrain
from tetrad.settings.ptx import Ptx
from tetrad.settings.reward import Reward
from tetrad.settings.sft import Sft
from tetrad.settings.tokenizer import Tokenizer


@settings
class Recipe:
    """The whole way of a model, from text to PPO. Every table is optional; a stage runs when its files are given."""

    name: str = ""
    """Name of the run: its folder is runs/<name>. Empty takes the recipe file's name."""
    seed: Seed = 0
    """Start of all random numbers; the same seed, files and settings give the same models."""
    model: Model = Model()
    tokenizer: Tokenizer = Tokenizer()
    pretrain: Pretrain = Pretrain()
    sft: Sft = Sft()
    reward: Reward = Reward()
    ppo: Ppo = Ppo()
    ptx: Ptx = Ptx()
    gate: Gate = Gate()
    alarms: Alarms = Alarms()
    evaluate: Evaluate = Evaluate()
    data: Data = Data()
    run: Run = Run()
    lora: Lora = Lora()
    optim: Optim = Optim()
    sampling: Sampling = Sampling()
