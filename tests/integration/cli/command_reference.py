"""Write the tables of docs/command-line.md from the code: `python -m tests.integration.cli.command_reference`."""

import re
from collections.abc import Iterator
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import typer
from loraplex.cli import errors as exits
from loraplex.cli.root import cli
from typer.main import get_command

PAGE = Path(__file__).parents[3] / "docs" / "command-line.md"
_EXITS = Path(exits.__file__)
_BEGIN, _END = "<!-- {}: from the code, by python -m tests.integration.cli.command_reference -->\n", "<!-- end -->"
_KINDS = {"str": "text", "int": "whole", "float": "number", "path": "path"}
_OF_TYPER = ("install_completion", "show_completion", "help")


def page_from_the_code(page: str) -> str:
    """The page with what comes from the code as the code has it now."""
    for name, text in (("commands", "\n".join(_commands())), ("exits", _exit_table())):
        begin = _BEGIN.format(name)
        pattern = re.compile(re.escape(begin) + r".*?" + re.escape(_END), re.DOTALL)
        assert pattern.search(page), f"the page has no place for {name}"
        written = f"{begin}{text}\n{_END}"
        page = pattern.sub(lambda _, written=written: written, page)  # type: ignore[misc]
    return page


def _commands() -> Iterator[str]:
    """A section for each command."""
    root = get_command(cli)
    for path, command in _walk(root, "loraplex"):
        if path == "loraplex":
            continue
        yield f"\n### `{_usage(path, command)}`\n\n{command.help}"
        yield from _table(command)


def _walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    yield path, command
    for name, below in getattr(command, "commands", {}).items():
        if hasattr(below, "commands"):
            yield from list(_walk(below, f"{path} {name}"))[1:]
        else:
            yield f"{path} {name}", below
    if path == "loraplex":
        for entry in sorted(entry_points(group="loraplex.commands"), key=lambda entry: entry.name):
            loaded = entry.load()
            if isinstance(loaded, typer.Typer):
                yield from list(_walk(get_command(loaded), f"loraplex {entry.name}"))[1:]
                continue
            app = typer.Typer(add_completion=False)
            app.command(entry.name)(loaded)
            yield f"loraplex {entry.name}", get_command(app)


def _usage(path: str, command: Any) -> str:
    arguments = [
        f"{_metavar(each)}" if each.required else f"[{_metavar(each)}]"
        for each in command.params
        if each.param_type_name == "argument"
    ]
    return " ".join([path, *arguments])


def _table(command: Any) -> Iterator[str]:
    shown = [each for each in command.params if each.name not in (*_OF_TYPER, "url", "profile", "as_json")]
    if not shown:
        return
    yield "\n| | value | default | |\n|---|---|---|---|"
    context = command.context_class(command, info_name=command.name)
    for each in shown:
        is_argument = each.param_type_name == "argument"
        name = _metavar(each) if is_argument else ", ".join([*each.opts, *each.secondary_opts])
        value = "" if is_argument or getattr(each, "is_flag", False) else _value(each, context)
        yield f"| `{name}` | {value} | {_default(each, context)} | {each.help} |"


def _value(parameter: Any, context: Any) -> str:
    kind = re.sub(r"[<>]|^list\[|\]$| range", "", parameter.display_type_rich(ctx=context) or "")
    bounds = re.sub("x>=", "≥ ", parameter._get_number_range_help_str() or "").replace("<=x<=", " – ")
    return (_KINDS.get(kind, kind).replace("|", r" \| ") + (f", {bounds}" if bounds else "")).strip()


def _metavar(argument: Any) -> str:
    return str(argument.metavar or argument.name.upper())


def _default(parameter: Any, context: Any) -> str:
    if parameter.required:
        return "required"
    told = parameter.show_default
    if isinstance(told, str):
        return told
    value = parameter._extract_default_help_str(ctx=context)
    if value in (None, False, "") or told is False or parameter.multiple:
        return ""
    return str(parameter._get_default_string(ctx=context, show_default_is_str=False, default_value=value))


def _exit_table() -> str:
    found = re.findall(r"^(\w+): Final = (\d+)\n\"\"\"(.+?)\"\"\"", _EXITS.read_text(), re.MULTILINE | re.DOTALL)
    lines = ["| status | |", "|---|---|", "| 0 | It is done. |"]
    return "\n".join([*lines, *(f"| {number} | {' '.join(text.split())} |" for _, number, text in found)])


if __name__ == "__main__":
    PAGE.write_text(page_from_the_code(PAGE.read_text()))
