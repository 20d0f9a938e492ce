"""The laws that no linter knows: budgets of code, things that happen in one file only, things that never happen.

`python scripts/laws.py [ROOT]` prints the figures and each breach as `file:line: law`, and exits 1 where there is one.
A line of code has something on it that is neither comment nor docstring. Imports have their own law in pyproject.toml.
"""

import ast
import io
import os
import re
import sys
import tokenize
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

FILE_BUDGET, FUNCTION_BUDGET, TOTAL_BUDGET = 300, 40, 20_300
FOLDER_BUDGET, NAMES_BUDGET, PAGE_BUDGET = 14, 25, 15
PAGES = ("grpo.py", "ppo.py", "reward.py")  # of train/, whose imports are counted
PRIVATE = {"found", "told", "made", "how", "said", "asked"}  # say nothing of what they hold
SILENT_TOKENS = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}
Function = ast.FunctionDef | ast.AsyncFunctionDef


# --- figures ---


def code_lines(source: str, tree: ast.Module) -> set[int]:
    """The numbers of the lines that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in SILENT_TOKENS:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            lines.difference_update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def functions(tree: ast.Module) -> Iterator[Function]:
    """Functions and methods, inner ones too."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def function_lines(function: Function, lines: set[int]) -> int:
    """Code lines from `def` to the end, inner functions included, decorators not."""
    return len(lines.intersection(range(function.lineno, (function.end_lineno or function.lineno) + 1)))


def bound(function: Function) -> set[str]:
    """The names that a function binds, its arguments too, those of inner functions not."""
    names: set[str] = set()
    nodes: list[ast.AST] = [function.args, *function.body]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.arg):
            names.add(node.arg)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        nodes += () if isinstance(node, Function) else ast.iter_child_nodes(node)
    return names


# --- what a call is ---


def dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names; what is no name stands as an empty part, as in `.b.c`."""
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else ""


def imported(node: ast.AST) -> list[str]:
    """The full names that an import statement brings in."""
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [f"{node.module or ''}.{alias.name}" for alias in node.names]
    return []


def called(node: ast.AST, *names: str) -> bool:
    """A call whose full name is one of `names`, or ends with it where the name starts with a dot."""
    if not isinstance(node, ast.Call):
        return False
    full = dotted(node.func)
    return any(full.endswith(name) if name.startswith(".") else full == name for name in names)


def uses(node: ast.AST, *words: str) -> bool:
    """An import, name or attribute whose last part contains one of the words."""
    if isinstance(node, ast.Name | ast.Attribute):
        last = node.id if isinstance(node, ast.Name) else node.attr
        return any(word in last for word in words)
    return any(word in name for name in imported(node) for word in words)


def below(node: ast.AST, *packages: str) -> bool:
    """An import or a dotted use of a package or of something in it."""
    names = imported(node) or ([dotted(node)] if isinstance(node, ast.Attribute) else [])
    return any(f"{name}.".startswith(f"{package}.") for name in names for package in packages)


def opens_for_writing(node: ast.AST) -> bool:
    """`open(x, "w")`, `path.open("a")`, `np.memmap(x, dtype, "r+")`: any constant mode that is not plain reading."""
    if not (called(node, "open", ".open", ".fdopen", ".memmap", ".open_memmap") and isinstance(node, ast.Call)):
        return False
    modes = [keyword.value for keyword in node.keywords if keyword.arg == "mode"] or node.args[:3]
    values = [mode.value for mode in modes if isinstance(mode, ast.Constant) and isinstance(mode.value, str)]
    return any(re.fullmatch(r"[rwaxbt+c]{1,3}", value) and set(value) & set("wax+") for value in values)


def replaces_path(node: ast.AST) -> bool:
    """`path.replace(target)`; `text.replace(a, b)` and `dataclasses.replace(x, y=1)` have other arguments."""
    if not (isinstance(node, ast.Call) and called(node, ".replace")):
        return False
    return len(node.args) == 1 and not node.keywords and not dotted(node.func).startswith("dataclasses.")


def steps(node: ast.AST) -> bool:
    """`optimizer.step()`; a cache's step is a decoding step."""
    return isinstance(node, ast.Call) and called(node, ".step") and not dotted(node.func).endswith("cache.step")


def writes(node: ast.AST) -> bool:
    """A call that makes, changes or removes something with a name in the file system; the null device is no file."""
    os_calls = ("replace", "rename", "renames", "remove", "unlink", "mkdir", "makedirs", "rmdir", "truncate", "link")
    if isinstance(node, ast.Call) and called(node, "os.open") and node.args and dotted(node.args[0]) == "os.devnull":
        return False
    named = ("mkstemp", "mkdtemp", "mktemp", "NamedTemporaryFile", "TemporaryDirectory")
    return (
        opens_for_writing(node)
        or replaces_path(node)
        or called(node, *(f"os.{name}" for name in os_calls), "os.symlink", "os.open", "os.write")
        or called(node, ".write_text", ".write_bytes", ".unlink", ".mkdir", ".rename", ".touch", ".rmdir")
        or called(node, ".symlink_to", ".hardlink_to", ".tofile", "np.save", "np.savez", "numpy.save", ".save_file")
        or below(node, "shutil.rmtree", "shutil.move", "shutil.copy", "shutil.copyfile", "shutil.copytree")
        or below(node, *(f"tempfile.{name}" for name in named))
    )


# --- the laws ---


@dataclass(frozen=True)
class Law:
    """broken: true for a node that only the files of `home` (paths under src/tetrad) may hold."""

    text: str
    broken: Callable[[ast.AST], bool]
    home: tuple[str, ...] = ()


STORAGE = ("storage.py", "disk.py")  # disk: storage's system calls, which tests swap
DISTRIBUTED = (
    "distributed/collectives.py",
    "distributed/watchdog.py",
    "distributed/launch.py",
    "distributed/sharding.py",
)  # beside it: who lives, who starts them, and FSDP
OBJECTS = ("all_gather", "gather", "scatter", "broadcast", "send", "recv")
CONSOLE = ("console.py", "cli/main.py")
LAWS = (
    Law("only update calls .backward()", lambda n: called(n, ".backward"), ("training/step.py",)),
    Law("only update steps an optimizer", steps, ("training/step.py", "training/optimizer.py")),
    Law(
        "only generate draws tokens",
        lambda n: uses(n, "multinomial", "Categorical", "gumbel") or below(n, "tetrad.inference.sampler"),
        ("inference/engine.py", "inference/sampler.py"),
    ),
    Law("only collectives communicate", lambda n: below(n, "torch.distributed"), DISTRIBUTED),
    Law("collectives of objects are pickles", lambda n: uses(n, *(f"{c}_object" for c in OBJECTS))),
    Law(
        "only attention knows kernels",
        lambda n: uses(n, "scaled_dot_product", "flash_attn", "flex_attention", "varlen_attn", "sdpa_kernel"),
        ("model/attention.py",),
    ),
    Law("only product knows oneDNN", lambda n: uses(n, "mkldnn"), ("kernels/onednn.py",)),
    Law("only storage writes files", writes, STORAGE),
    Law(
        "only the console and the command line print",
        lambda n: called(n, "print", "sys.stdout.write", "sys.stderr.write"),
        CONSOLE,
    ),
    Law("pickles are never read", lambda n: below(n, "pickle", "dill", "cloudpickle", "marshal", "shelve", "joblib")),
    Law("torch.load and torch.save are pickles", lambda n: below(n, "torch.load", "torch.save")),
    Law("no text becomes code", lambda n: called(n, "eval", "exec", "compile")),
    Law("no shell", lambda n: below(n, "os.system", "os.popen", "subprocess", "pty")),
    Law(
        "transformers and its kin stay out",
        lambda n: below(n, "transformers", "datasets", "trl", "accelerate", "peft"),
    ),
)
# Written in two parts, so that this file does not hold them.
FOREIGN_TEXTS = ("../" + "shared", "/wo" + "rk/", "/tm" + "p/w/")
TEXT_SUFFIXES = {".py", ".md", ".toml", ".txt", ".sh", ".json", ".jsonl", ".yml", ".yaml", ""}
SKIPPED_FOLDERS = {"runs", "dist", "build", "__pycache__"}


@dataclass(frozen=True)
class Figures:
    """Code lines: of each file, and of each function as `file:line name`, whose bound names are counted too."""

    files: dict[str, int]
    functions: dict[str, int]
    names: dict[str, int]

    @property
    def folders(self) -> dict[str, int]:
        """Modules in each folder; __init__ is none."""
        return dict(Counter(str(Path(name).parent) for name in self.files if not name.endswith("__init__.py")))


def read_source(path: Path, name: str, figures: Figures) -> Iterator[str]:
    """Counts one file of src/tetrad and yields its breaches."""
    source = path.read_text(encoding="utf-8")
    tree = ast.parse(source)
    lines = code_lines(source, tree)
    figures.files[name] = len(lines)
    if len(lines) > FILE_BUDGET:
        yield f"{name}:1: {len(lines)} lines of code, over {FILE_BUDGET} a file"
    for function in functions(tree):
        size = function_lines(function, lines)
        figures.functions[f"{name}:{function.lineno} {function.name}"] = size
        if size > FUNCTION_BUDGET:
            yield f"{name}:{function.lineno}: {function.name} has {size} lines of code, over {FUNCTION_BUDGET}"
        names = bound(function)
        figures.names[f"{name}:{function.lineno} {function.name}"] = len(names)
        if len(names) > NAMES_BUDGET:
            yield f"{name}:{function.lineno}: {function.name} binds {len(names)} names, over {NAMES_BUDGET}"
        for word in sorted(names & PRIVATE):
            yield f"{name}:{function.lineno}: {function.name} binds `{word}`, which says nothing of what it holds"
    inner = name.removeprefix("src/tetrad/")
    for node in ast.walk(tree):
        for law in LAWS:
            if inner not in law.home and law.broken(node):
                yield f"{name}:{getattr(node, 'lineno', 1)}: {law.text}"


def foreign_texts(root: Path) -> Iterator[str]:
    """Places of one machine named in the project's own files."""
    for folder, folders, names in os.walk(root):
        fetched = "data" if Path(folder).parent == root / "examples" else ""
        folders[:] = sorted(set(folders) - SKIPPED_FOLDERS - {fetched})
        folders[:] = [name for name in folders if name == ".ci" or not name.startswith(".")]
        for path in (Path(folder, name) for name in sorted(names)):
            if path.suffix not in TEXT_SUFFIXES:
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
                for text in FOREIGN_TEXTS:
                    if text in line:
                        yield f"{path.relative_to(root)}:{number}: names a place of one machine, {text}"


def check(root: Path) -> tuple[Figures, list[str]]:
    """The figures of src/tetrad under `root`, and every breach."""
    figures, breaches = Figures({}, {}, {}), list[str]()
    for path in sorted((root / "src" / "tetrad").rglob("*.py")):
        breaches += dict.fromkeys(read_source(path, path.relative_to(root).as_posix(), figures))
    for folder, count in figures.folders.items():
        if count > FOLDER_BUDGET:
            breaches.append(f"{folder}: {count} files, over {FOLDER_BUDGET} a folder")
    for page in (root / "src" / "tetrad" / "train" / name for name in PAGES):
        if page.is_file() and len(modules := own_modules(page)) > PAGE_BUDGET:
            breaches.append(f"src/tetrad/train/{page.name}:1: imports {len(modules)} own modules, over {PAGE_BUDGET}")
    total = sum(figures.files.values())
    if total > TOTAL_BUDGET:
        breaches.append(f"src: {total} lines of code, over {TOTAL_BUDGET}")
    return figures, [*breaches, *foreign_texts(root)]


def own_modules(path: Path) -> set[str]:
    """The modules of Tetrad that a file imports, or imports from."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    froms = [node for node in nodes if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tetrad")]
    packages = {
        str(folder.relative_to(path.parents[1].parent)).replace(os.sep, ".") for folder in path.parents[1].iterdir()
    }
    return {
        f"{node.module}.{alias.name}" if node.module in packages else str(node.module)
        for node in froms
        for alias in node.names
    }


def largest(counts: dict[str, int], unit: str) -> str:
    """The five largest, one a line."""
    rows = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
    return "\n".join([f"largest {unit}:", *(f"  {size:4d}  {name}" for name, size in rows)])


def main(root: Path) -> int:
    """Prints figures and breaches; 1 where a law is broken."""
    figures, breaches = check(root)
    total = sum(figures.files.values())
    print(f"src: {total:,} lines of code in {len(figures.files)} files (budget {TOTAL_BUDGET:,})")
    print(largest(figures.files, f"files (budget {FILE_BUDGET})"))
    print(largest(figures.functions, f"functions (budget {FUNCTION_BUDGET})"))
    print(largest(figures.folders, f"folders (budget {FOLDER_BUDGET} files)"))
    print(largest(figures.names, f"numbers of names in a function (budget {NAMES_BUDGET})"))
    print("\n".join(breaches) if breaches else "no law is broken")
    return 1 if breaches else 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]))
