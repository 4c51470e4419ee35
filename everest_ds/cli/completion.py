"""`everest --tyro-print-completion bash`: prints a script that completes commands, recipes, flags and choices.

The flags come from the parser of each command. The script contains all of them, so completion starts no Python.
"""

import ast
import contextlib
import io
import re
from collections.abc import Iterator
from typing import Any

from everest_ds.cli.table import COMMANDS
from everest_ds.commands.data.index import IMPORTERS
from everest_ds.commands.parsing import known_recipes
from everest_ds.config import TaskName
from everest_ds.distributed import World
from everest_ds.errors import UserError

FLAG = "--tyro-print-completion"
_TASKS: dict[str, TaskName] = {"pretrain": "pretrain", "finetune": "finetune"}
_TAKES_RECIPE = ("pretrain", "finetune", "plan", "recipes", "benchmark data", "benchmark step")
_HIDDEN = {"--recipe", "--task"}
_ALONE = World(rank=0, local_rank=0, size=1, local_size=1)
# A shell without a completion system of its own lacks compdef, which bashcompinit needs.
_ZSH = """(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u; }
autoload -Uz bashcompinit && bashcompinit
"""
_SCRIPT = """\
# completion of everest for {shell}; source this file
{prelude}_everest() {{
  local current=${{COMP_WORDS[COMP_CWORD]}} previous=${{COMP_WORDS[COMP_CWORD-1]}} at=2
  local command=${{COMP_WORDS[1]}} flags= first= words=
  COMPREPLY=()
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W {commands} -- "$current"))
    return
  fi
  case $command in {groups}) command="$command ${{COMP_WORDS[2]}}" at=3 ;; esac
  case $command in
{flags}
  esac
  case "$command $previous" in
{choices}
  esac
  if [[ -n $words ]]; then
    COMPREPLY=($(compgen -W "$words" -- "$current"))
  elif [[ $current == -* ]]; then
    COMPREPLY=($(compgen -W "$flags" -- "$current"))
  elif (( COMP_CWORD <= at )) && [[ -n $first ]]; then
    COMPREPLY=($(compgen -W "$first" -- "$current") $(compgen -f -- "$current"))
  fi
}}
complete -o default -F _everest everest
"""


def completion_script(shell: str) -> str:
    """Return the completion script for a shell.

    Raises:
        UserError: The shell is neither bash nor zsh.
    """
    if shell not in ("bash", "zsh"):
        raise UserError(f"{FLAG} {shell}: expected bash or zsh, for example `source <(everest {FLAG} bash)`")
    groups = {name: list(command.parts) for name, command in COMMANDS.items() if command.parts}
    groups["index"] = list(IMPORTERS)
    flags, choices = [], []
    for name, spec in _specs():
        takes_recipe = name in _TAKES_RECIPE
        options = [one for one in spec["options"] if not (takes_recipe and _HIDDEN.issuperset(one["flags"]))]
        words = [flag for option in options for flag in option["flags"] if flag.startswith("-")] + ["-q", "-v"]
        first = " ".join(known_recipes(_TASKS.get(name))) if takes_recipe else ""
        flags.append(f"    {_quoted(name)}) flags={_quoted(' '.join(words))} first={_quoted(first)} ;;")
        for option in options:
            if option.get("choices"):
                cases = "|".join(_quoted(f"{name} {flag}") for flag in option["flags"] if flag.startswith("-"))
                choices.append(f"    {cases}) words={_quoted(' '.join(map(str, option['choices'])))} ;;")
    for name, parts in groups.items():  # the word after the command is one of its parts
        choices.append(f'    "{name} "*" {name}") words={_quoted(" ".join(parts))} ;;')
    return _SCRIPT.format(
        shell=shell,
        prelude=_ZSH if shell == "zsh" else "",
        commands=_quoted(" ".join(COMMANDS)),
        groups="|".join(groups),
        flags="\n".join(flags),
        choices="\n".join(choices),
    )


def _specs() -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each command with its options and subcommands, as its parser describes them."""
    for name, command in COMMANDS.items():
        if name == "index":
            yield from ((f"index {dataset}", _spec(command.load_entry(), dataset)) for dataset in IMPORTERS)
        elif command.parts:
            yield from ((f"{name} {part}", _spec(leaf.load_entry())) for part, leaf in command.parts.items())
        else:
            yield name, _spec(command.load_entry())


def _spec(entry: Any, *words: str) -> dict[str, Any]:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit, UserError):
        entry([*words, FLAG, "bash"], _ALONE)
    found = re.search(r"^COMPLETION_SPEC = (.*)$", printed.getvalue(), re.MULTILINE)
    return ast.literal_eval(found.group(1)) if found else {"options": []}


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"
