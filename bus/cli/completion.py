"""`bus completion`: the script by which a shell completes commands and options."""

from typing import Annotated, Literal

from cyclopts import Parameter

from bus.cli.app import tree
from bus.cli.options import Json
from bus.cli.output import json_line, say


def completion(
    shell: Literal["bash", "zsh", "fish"],
    /,
    *,
    install: Annotated[bool, Parameter(negative="")] = False,
    json: Json = False,
) -> None:
    """Print what makes a shell complete commands and options.

    For example:

      source <(bus completion bash)
      bus completion zsh --install

    Parameters
    ----------
    install
        Put it where the shell finds it, and a line into its own file (.bashrc, .zshrc) if it has to
        be told; say where that is.
    json
        Say it as JSON.
    """
    if install:
        path = str(tree().install_completion(shell=shell))
        if json:
            json_line({"shell": shell, "written": path})
        else:
            say(f"written to {path}")
        return
    script = tree().generate_completion(shell=shell)
    if json:
        json_line({"shell": shell, "script": script})
    else:
        print(script)  # noqa: T201 - a script, as it is
