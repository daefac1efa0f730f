"""Binds every call of another package's functions and classes to that package's source, read and never imported.

So any version can be checked, on any machine and Python.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Iterator
from dataclasses import dataclass, field
from inspect import Parameter
from pathlib import Path

MAX_DEPTH = 8  # re-exports that are followed


@dataclass(frozen=True)
class Found:
    """A module (without a node), function, class or value, and the module in which it stands."""

    node: ast.AST | None
    module: str


@dataclass
class Package:
    """The source of one package below `root`."""

    root: Path
    trees: dict[str, ast.Module | None] = field(default_factory=dict)

    def tree(self, module: str) -> ast.Module | None:
        if module not in self.trees:
            base = self.root.joinpath(*module.split("."))
            files = [base.with_suffix(".py"), base / "__init__.py"]
            file = next((file for file in files if file.is_file()), None)
            self.trees[module] = ast.parse(file.read_text()) if file else None
        return self.trees[module]

    def find(self, module: str, name: str, depth: int = 0) -> Found | None:
        """What `from module import name` gives; None if there is no such name."""
        if self.tree(f"{module}.{name}") is not None:
            return Found(None, f"{module}.{name}")
        tree = self.tree(module)
        if tree is None or depth > MAX_DEPTH:
            return None
        for node in ast.walk(tree):
            if _defines(node, name):
                return Found(node, module)
        for source, original in self._imports(tree, module, name):
            if found := self.find(source, original, depth + 1):
                return found
        return None

    def _imports(self, tree: ast.Module, module: str, name: str) -> Iterator[tuple[str, str]]:
        """Modules and names from which `module` may import `name`."""
        package = (self.root.joinpath(*module.split(".")) / "__init__.py").is_file()
        for node in ast.walk(tree):
            if not isinstance(node, ast.ImportFrom):
                continue
            base = node.module or ""
            if node.level:
                above = module.split(".") if package else module.split(".")[:-1]
                above = above[: len(above) - node.level + 1]
                base = ".".join([*above, *filter(None, [base])])
            for alias in node.names:
                if name == (alias.asname or alias.name) or alias.name == "*":
                    yield base, name if alias.name == "*" else alias.name

    def signature(self, found: Found) -> inspect.Signature | None:
        """How a function or class is called; None if that is not to be read from this package."""
        if isinstance(found.node, ast.FunctionDef | ast.AsyncFunctionDef):
            return _signature(found.node.args)
        return self._constructor(found.node, found.module) if isinstance(found.node, ast.ClassDef) else None

    def _constructor(self, node: ast.ClassDef, module: str) -> inspect.Signature | None:
        for item in node.body:
            if isinstance(item, ast.FunctionDef) and item.name == "__init__":
                return _signature(item.args, method=True)
        if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
            names = dict.fromkeys(self._fields(node, module))
            return inspect.Signature([Parameter(n, Parameter.POSITIONAL_OR_KEYWORD, default=None) for n in names])
        for base in self._bases(node, module):
            if isinstance(base.node, ast.ClassDef) and (found := self._constructor(base.node, base.module)):
                return found
        return None

    def _fields(self, node: ast.ClassDef, module: str) -> Iterator[str]:
        for base in self._bases(node, module):
            if isinstance(base.node, ast.ClassDef):
                yield from self._fields(base.node, base.module)
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                yield item.target.id

    def _bases(self, node: ast.ClassDef, module: str) -> Iterator[Found]:
        for base in node.bases:
            if isinstance(base, ast.Name) and (found := self.find(module, base.id)):
                yield found


def _defines(node: ast.AST, name: str) -> bool:
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        return node.name == name and node.col_offset <= MAX_DEPTH  # also inside a module's `if` or `try`
    if isinstance(node, ast.Assign | ast.AnnAssign) and node.col_offset == 0:
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return any(isinstance(target, ast.Name) and target.id == name for target in targets)
    return False


def _signature(args: ast.arguments, method: bool = False) -> inspect.Signature:
    names = [*args.posonlyargs, *args.args]
    optional = len(names) - len(args.defaults)
    made = [
        Parameter(
            arg.arg,
            Parameter.POSITIONAL_ONLY if i < len(args.posonlyargs) else Parameter.POSITIONAL_OR_KEYWORD,
            default=Parameter.empty if i < optional else None,
        )
        for i, arg in enumerate(names)
    ][int(method) :]
    if args.vararg:
        made.append(Parameter(args.vararg.arg, Parameter.VAR_POSITIONAL))
    for arg, default in zip(args.kwonlyargs, args.kw_defaults, strict=True):
        made.append(Parameter(arg.arg, Parameter.KEYWORD_ONLY, default=Parameter.empty if default is None else None))
    if args.kwarg:
        made.append(Parameter(args.kwarg.arg, Parameter.VAR_KEYWORD))
    return inspect.Signature(made)


@dataclass
class Report:
    """`wrong`: "file:line: what does not fit"."""

    names: int = 0
    calls: int = 0
    wrong: list[str] = field(default_factory=list)


def check(files: list[Path], prefix: str, package: Package) -> Report:
    """Every name that `files` import from modules below `prefix`, and every call of one."""
    report = Report()
    for file in files:
        _check_file(file, ast.parse(file.read_text()), prefix, package, report)
    return report


def _check_file(file: Path, tree: ast.Module, prefix: str, package: Package, report: Report) -> None:
    known: dict[str, Found] = {}
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or not f"{node.module}.".startswith(f"{prefix}."):
            continue
        assert node.module is not None
        for alias in node.names:
            report.names += 1
            if found := package.find(node.module, alias.name):
                known[alias.asname or alias.name] = found
            else:
                report.wrong.append(f"{file.name}:{node.lineno}: {node.module}.{alias.name} is not there")
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        called, function = None, node.func
        if isinstance(function, ast.Name):
            called = known.get(function.id)
        elif isinstance(function, ast.Attribute) and isinstance(function.value, ast.Name):
            module = known.get(function.value.id)
            if module is None or module.node is not None:
                continue
            called = package.find(module.module, function.attr)
            if called is None:
                report.wrong.append(f"{file.name}:{node.lineno}: {module.module}.{function.attr} is not there")
        if called and (signature := package.signature(called)):
            report.calls += 1
            if error := _misfit(node, signature):
                report.wrong.append(f"{file.name}:{node.lineno}: {ast.unparse(function)}: {error}")


def _misfit(call: ast.Call, signature: inspect.Signature) -> str:
    """Why the arguments do not fit; empty if they do. With * or **, only what is written out is compared."""
    partial = any(isinstance(arg, ast.Starred) for arg in call.args) or any(not k.arg for k in call.keywords)
    positional = [None for arg in call.args if not isinstance(arg, ast.Starred)]
    named = {keyword.arg: None for keyword in call.keywords if keyword.arg}
    try:
        (signature.bind_partial if partial else signature.bind)(*positional, **named)
    except TypeError as e:
        return str(e)
    return ""
