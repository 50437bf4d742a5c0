"""Sources of SGLang's releases, brought from the package registry, and read without being imported."""

import ast
import subprocess
import sys
import zipfile
from functools import cache, cached_property
from pathlib import Path

FOLDER = Path(__file__).parents[2] / "build" / "sglang"
WHEEL = [
    *("--no-deps", "--only-binary=:all:", "--python-version", "3.12", "--implementation", "cp"),
    # Of a release with another tag than these, an older one would be taken for the newest.
    *(f"--platform=manylinux_2_{minor}_x86_64" for minor in range(17, 51)),
]


class Sources:
    """The sources of one release."""

    def __init__(self, wheel: Path) -> None:
        self.version = wheel.name.split("-")[1]
        self._wheel = zipfile.ZipFile(wheel)

    @cached_property
    def _names(self) -> set[str]:
        return set(self._wheel.namelist())

    def text(self, module: str) -> str:
        """The module's text; empty if there is no such module."""
        path = module.replace(".", "/")
        found = next((name for name in (f"{path}.py", f"{path}/__init__.py") if name in self._names), None)
        return "" if found is None else self._wheel.read(found).decode()

    @cache  # noqa: B019
    def tree(self, module: str) -> ast.Module | None:
        """The module's syntax tree; None if there is no such module."""
        text = self.text(module)
        return ast.parse(text) if text else None

    def find(self, path: str) -> ast.AST | None:
        """The class or function `module:name.name`, also one that a base class in the same module has."""
        module, _, name = path.partition(":")
        found: ast.AST | None = self.tree(module)
        for part in name.split("."):
            if found is None:
                return None
            found = self._member(module, found, part)
        return found

    def _member(self, module: str, owner: ast.AST, name: str) -> ast.AST | None:
        for node in getattr(owner, "body", []):
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name:
                return node
        bases = [base.id for base in getattr(owner, "bases", []) if isinstance(base, ast.Name)]
        found = (self.find(f"{module}:{base}.{name}") for base in bases)
        return next((node for node in found if node is not None), None)

    def unparsed(self, path: str) -> str:
        """The class's or function's code, laid out anew."""
        found = self.find(path)
        assert found is not None, f"SGLang {self.version} has no {path}"
        return ast.unparse(found)

    def parameters(self, path: str) -> set[str] | None:
        """The names of the function's parameters; None if there is no such function."""
        function = self.find(path)
        if not isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef):
            return None
        arguments = function.args
        return {each.arg for each in (*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs)}

    def fields(self, path: str) -> set[str]:
        """What the class declares in its body, or assigns to `self` in any of its methods."""
        owner = self.find(path)
        assert owner is not None, f"SGLang {self.version} has no {path}"
        found = set()
        for node in ast.walk(owner):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                found.add(node.target.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
            elif isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
        return found

    def annotated(self, folder: str) -> set[str]:
        """What the classes of the modules in a folder declare with a type."""
        texts = [
            self._wheel.read(name).decode() for name in self._names if name.startswith(folder) and name[-3:] == ".py"
        ]
        nodes = (node for text in texts for node in ast.walk(ast.parse(text)))
        return {
            node.target.id for node in nodes if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)
        }

    def calls(self, module: str, method: str) -> list[set[str | None]]:
        """The keywords of each call of `something.method(...)` in the module."""
        tree = self.tree(module)
        assert tree is not None, f"SGLang {self.version} has no module {module}"
        return [
            {keyword.arg for keyword in node.keywords}
            for node in ast.walk(tree)
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == method
        ]


def download(version: str | None) -> Sources:
    """The release of this version, or the newest that the registry has."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    if version is not None and (there := sorted(FOLDER.glob(f"sglang-{version}-*.whl"))):
        return Sources(there[0])
    wanted = "sglang" if version is None else f"sglang=={version}"
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(FOLDER), *WHEEL, wanted]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    wheels = sorted(FOLDER.glob(f"sglang-{version or '*'}-*.whl"), key=lambda path: number(path.name.split("-")[1]))
    return Sources(wheels[-1])


def number(version: str) -> tuple[int, ...]:
    """By which releases are in order."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in version.split("."))
