"""Before a stage runs: can it run at all? Checks the folders it starts from and its own checkpoints, without torch.

Errors are reported before the first stage begins, so that hours of training are not followed by an error that was
there from the start.
"""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from tetrad.errors import UserError
from tetrad.inference import model_folder
from tetrad.registry import POLICY, Recipe
from tetrad.text.chat_template import choose
from tetrad.text.tokenizer import SEPARATOR, Tokenizer
from tetrad.types import Turn

_ROLES = {"reward": "reward", "from": "any"}


class Preflight:
    """Checks each folder once. ahead: folders that stages of this run will create. verify: compares sha256."""

    def __init__(self, recipe: Recipe, ahead: Collection[Path], verify: Callable[[Path], None]) -> None:
        self.recipe, self.ahead, self.verify = recipe, ahead, verify
        self.notes: list[str] = []
        self._seen: dict[tuple[Path, str], model_folder.Checked] = {}
        self._verified: set[Path] = set()

    def refuse(self, stage: str, parents: Mapping[str, Path]) -> None:
        """Raises UserError E-MODEL-*, E-CKPT-*, E-CONF-RANGE for what the stage can't start from."""
        there = {role: folder for role, folder in parents.items() if folder not in self.ahead}
        if "tokenizer" in there:
            self._verify(there.pop("tokenizer"))
            Tokenizer.load(parents["tokenizer"])
        models = {role: self._look(folder, _ROLES.get(role, "language")) for role, folder in there.items()}
        policy = next((models.get(role) for role in POLICY if role in parents), None)
        role = {"ppo": "reward", "reward": "from"}.get(stage, "")
        if role in models and policy and self.recipe.ppo.prompts and self.recipe.ppo.critic == "reward":
            model_folder.refuse_other_tokenizer(there[role], models[role].tokenizer, policy.tokenizer)
        for spec in self.recipe.alarms.judges if stage == "ppo" else ():
            if not (file := Path(spec.rpartition(":")[0])).is_file():
                hint = "write FILE.py:FUNCTION in alarms.judges"
                raise UserError("E-CONF-MISSING", "there is no such Python file", where=str(file), hint=hint)
        if stage == "sft" and policy:
            folder = next(there[role] for role in POLICY if role in there)
            self._refuse_template(folder, policy.tokenizer)

    def _look(self, folder: Path, role: str) -> model_folder.Checked:
        if (folder, role) not in self._seen:
            self._verify(folder)
            checked = model_folder.check(folder, role=role, verify=False)
            self._seen[folder, role] = checked
            if checked.note and checked.note not in self.notes:
                self.notes.append(checked.note)
        return self._seen[folder, role]

    def _verify(self, folder: Path) -> None:
        if folder not in self._verified:
            self.verify(folder)
            self._verified.add(folder)

    def _refuse_template(self, folder: Path, tokenizer: Tokenizer) -> None:
        """A foreign tokenizer must have the template's control tokens."""
        s = self.recipe.sft
        if s.add_separator:
            tokenizer = tokenizer.with_control(SEPARATOR)
        try:
            choose(folder, s.template, s.separator, own=False).prompt(tokenizer, (Turn("user", "a"),), "")
        except UserError as error:
            raise UserError(error.code, error.what, where=error.where or "sft.template", hint=error.hint) from None
