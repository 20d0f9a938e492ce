from pathlib import Path

import pytest

from served import write_model


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's folder: pretrain, sft, ppo, reward, chat (chatml), and judge: a reward model with its own tokenizer."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    write_model(folder / "pretrain", "")
    write_model(folder / "sft", seed=1)
    write_model(folder / "ppo", seed=2)
    write_model(folder / "reward", reward=True, reward_bias=-0.5)
    write_model(folder / "judge", reward=True, size=280, seed=3)
    write_model(folder / "chat", "chatml", seed=4)
    return folder
